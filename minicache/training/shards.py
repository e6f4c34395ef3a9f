"""Weights and optimizer state by name, whether a model is whole or in shards."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minicache.models.quantized import is_quantized
from minicache.processes.world import World
from minicache.scoring.scorer import Scorer

BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def trainable(scorer: Scorer, world: World) -> nn.Module:
    """The module to call in training: it averages the gradients over the processes.

    With DDP the gradients lie in the buckets that it sends, from the first micro-batch on, and are there once. torch puts them
    there in the first backward pass that is reduced, and again after each `zero_grad(set_to_none=True)`; until then those of the
    micro-batches before it would lie beside the empty buckets.
    """
    if world.size == 1 or isinstance(scorer, FSDPModule):
        return scorer
    made = DistributedDataParallel(scorer, gradient_as_bucket_view=True)
    # a backward pass of zeros
    made.reducer.prepare_for_backward([])
    for parameter in reversed([each for each in scorer.parameters() if each.requires_grad]):
        parameter.backward(torch.zeros_like(parameter))
    return made


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights, or of an adapter's weights alone, in the CPU's memory on rank 0; {} on other ranks.

    Shards are gathered one by one; all ranks take part.
    """
    if is_quantized(model):
        # torch does not find bitsandbytes' tensors by their names; such a model is whole, and its adapters alone are saved
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        return {name: each.detach().to("cpu", copy=True) for name, each in trained.items()}
    adapted = hasattr(model, "get_base_model")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapted)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    # torch does not copy what was whole and on the CPU already.
    own = {parameter.data_ptr() for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    return {name: value.clone() if value.data_ptr() in own else value for name, value in state.items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state by the names of the parameters; in a model of shards, this process's own.

    A new optimizer's state is created first; its step counts stand at 1 until `set_optimizer_tensors` overwrites them.
    """
    state = get_optimizer_state_dict(model, optimizer, options=BY_NAME)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}  # type: ignore[misc]


def set_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors of `optimizer_tensors` back into an optimizer."""
    # The other entries, such as learning rates, come from the options and are in no checkpoint.
    settings = get_optimizer_state_dict(model, optimizer, options=BY_NAME)
    set_optimizer_state_dict(model, optimizer, {**settings, **tensors}, options=BY_NAME)  # type: ignore[dict-item]
