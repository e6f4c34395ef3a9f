"""The decoder layers of a model, and what is done with each."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from minicache.errors import ModelError


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
