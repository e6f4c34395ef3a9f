"""The decoder layers of a model, and what is done with each."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from minicache.errors import ModelError

# Layers at the start that may differ from those that repeat (dense layers of a mixture), and the longest cycle of kinds of layers.
MOST_FIRST, MOST_PERIOD = 4, 8


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model; empty if its code does not mark them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_activations(model: nn.Module, kept: int = 0) -> None:
    """Keep only the input of each decoder layer, and compute the layer again in backward.

    kept: the number of layers that keep all. They are the last ones, whose activations backward frees first.

    transformers' own switch works in train mode only, which would turn dropout on.

    Raises:
        ModelError: the model's code does not mark its layers.

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    layers = layers_of(model)
    if not layers:
        raise ModelError("--activation-checkpointing: this model's code marks no layers for it; leave it off")
    for layer in layers[: len(layers) - kept]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def stack_of(model: nn.Module) -> nn.ModuleList | None:
    """The list of all decoder layers of a model; None if they are in several, or not marked."""
    layers = set(layers_of(model))
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and layers & set(each)]
    return lists[0] if len(lists) == 1 and set(lists[0]) == layers else None


def repeats_of(model: Any, stack: nn.ModuleList | None) -> tuple[int, int]:
    """The number of layers before those that repeat, and after how many they do; (0, all of them) if they do not."""
    if stack is None:
        return 0, 0
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(stack)
    signs = [
        (type(layer), kind, tuple((name, each.shape, each.dtype) for name, each in layer.named_parameters()))
        for layer, kind in zip(stack, kinds, strict=False)
    ]
    for first in range(MOST_FIRST):
        for period in range(1, MOST_PERIOD):
            if signs[first:-period] == signs[first + period :]:
                return first, period
    return 0, len(stack)
