"""In what precision the weights of a model are held for passes in a given one, and what else computes with such a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from minicache.errors import fits
from minicache.models.quantized import quantized_layers

# What may be asked of a weight without reading its numbers or their precision.
SHAPES = {"device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "is_floating_point"}


def hold_for(model: nn.Module, device: torch.device, dtype: str) -> nn.Module:
    """The model on the device, in place, with its weights as passes in `dtype` need them: frozen ones in half precision or float32.

    Values are the stored ones, and so is all that the passes compute, bit for bit.

    Raises:
        FullMemory: they do not fit on the device.
    """
    count = sum(each.numel() for each in model.parameters())
    with fits(
        f"a model of {count:,} parameters", "--parallel fsdp on several devices, --base-4bit, or a smaller model"
    ):
        return _hold_for(model, device, dtype)


def _hold_for(model: nn.Module, device: torch.device, dtype: str) -> nn.Module:
    half = half_weights(model, getattr(torch, dtype))
    # Not the model's own `to`, which transformers forbids for a quantized model. It is moved as it is stored: no process holds it
    # in float32 in the CPU's memory on its way to a GPU.
    nn.Module.to(model, device)
    layers = set(quantized_layers(model))
    module: Any
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in own if module not in layers else [module.bias]:
            if tensor is not None and tensor.is_floating_point() and id(tensor) not in half:
                tensor.data = tensor.data.float()
        if type(module) is nn.Embedding and id(module.weight) in half:
            module.register_forward_hook(_to_float32)
    return model


def to_float32(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device in float32; of a quantized one embeddings, norms and head alone."""
    return hold_for(model, device, "float32")


def half_weights(model: nn.Module, dtype: torch.dtype) -> set[int]:
    """The ids of the parameters that stay in half precision for passes in this dtype; all others are held in float32.

    They are frozen weights of linear layers that are stored in it. Under autocast the layer casts a float32 copy back to just these
    numbers, in every pass. An embedding that is tied to one looks up the same numbers, which are cast behind it.
    """
    if dtype == torch.float32:
        return set()
    uses: dict[int, set[type[nn.Module]]] = {}
    found: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # code of a subclass may do more with a weight than multiply by it
            uses.setdefault(id(parameter), set()).add(type(module) if name == "weight" else nn.Module)
            if parameter.dtype == dtype and not parameter.requires_grad:
                found.add(id(parameter))
    return {each for each in found if nn.Linear in uses[each] and uses[each] <= {nn.Linear, nn.Embedding}}


def _to_float32(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()


class Settling(TorchFunctionMode):
    """Within it a model is run once without autocast: its half weights compute in the precision of their input.

    A weight that the model's code reads past its layer (`layer.weight @ hidden`, `hidden.to(layer.weight.dtype)`) becomes float32
    for good: what the code makes of its precision is not known.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        half = half_weights(model, torch.bfloat16) | half_weights(model, torch.float16)
        self.half = {id(each): each for each in model.parameters() if id(each) in half}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            args = (args[0], args[1].to(args[0].dtype), *args[2:])
        elif func is not functional.embedding and _name(func) not in SHAPES:
            for each in [*args, *(kwargs or {}).values()]:
                if id(each) in self.half:
                    each.data = each.data.float()
        return func(*args, **(kwargs or {}))


def _name(func: Any) -> str:
    """The name of a function of torch, or of the attribute of a tensor that it gets."""
    return str(getattr(getattr(func, "__self__", None), "__name__", None) or func.__name__)


@contextmanager
def seen_in_float32(model: nn.Module) -> Iterator[None]:
    """Let the model's weights look like float32 ones without values: peft gives adapters the precision of the weights below them.

    Cast to half precision and back, their first factors would be others.
    """
    half = [each for each in model.parameters() if each.dtype in (torch.bfloat16, torch.float16)]
    stored = [each.data for each in half]
    try:
        for each in half:
            each.data = torch.zeros(1, device=each.device).expand(each.shape)
        yield
    finally:
        for each, data in zip(half, stored, strict=True):
            each.data = data
