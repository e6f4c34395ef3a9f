"""In what precision the weights of a model are held for passes in a given one, and what else computes with such a model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from minicache.errors import fits
from minicache.models.quantized import is_linear, quantized_layers
from minicache.processes.devices import kind_of

HALF = (torch.bfloat16, torch.float16)
# What may be asked of a weight without reading its numbers or their precision; what is cast to float32 is the same from both.
HARMLESS = {"float", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "is_floating_point"}


def hold_for(model: nn.Module, device: torch.device, dtype: str, trained: str = "float32") -> nn.Module:
    """The model on the device, in place, with its weights as passes in `dtype` need them: frozen ones in half precision or float32.

    Values are the stored ones, and so is all that the passes compute, bit for bit.

    trained: precision of the weights that are trained, "float32" or that of the passes. In the latter, those of linear layers and
    of plain embeddings are rounded to it, if they are stored wider; all others are float32.

    Raises:
        FullMemory: they do not fit on the device.
    """
    count = sum(each.numel() for each in model.parameters())
    with fits(
        f"a model of {count:,} parameters", "--parallel fsdp on several devices, --base-4bit, or a smaller model"
    ):
        return _hold_for(model, device, getattr(torch, dtype), trained != "float32")


def _hold_for(model: nn.Module, device: torch.device, dtype: torch.dtype, narrow: bool) -> nn.Module:
    experts = _stacked(model, dtype, device)
    half = half_weights(model, dtype) | experts.keys()
    if narrow:
        half |= _may_be_half(model, [each for each in model.parameters() if each.requires_grad])
        for parameter in model.parameters():
            if id(parameter) in half:
                parameter.data = parameter.data.to(dtype)
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
    look_up_in_float32(model)
    for module in {id(each): each for each in experts.values()}.values():
        module.register_forward_pre_hook(_widen)
        module.register_forward_hook(_narrow, always_call=True)
    return model


def look_up_in_float32(model: nn.Module) -> None:
    """Let the embeddings that are in half precision give float32."""
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight.dtype in HALF:
            vars(module)["forward"] = partial(_look_up, module)


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
    return _may_be_half(model, [each for each in model.parameters() if each.dtype == dtype and not each.requires_grad])


def _stacked(model: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[int, nn.Module]:
    """The experts of a mixture that lie in one parameter, frozen and stored in this precision: the parameter's id -> its module.

    Where something is trained, those alone whose product follows autocast: another keeps for backward what it multiplied by, the
    float32 copy. Those that peft adapts are float32, too: it adds to them.
    """
    if dtype == torch.float32:
        return {}
    trained = any(each.requires_grad for each in model.parameters())
    owned = (
        (each, module)
        for name, module in model.named_modules()
        if not trained or (device.type == "cuda" and _by_groups(module) and not name.endswith("base_layer"))
        for each in module.parameters(recurse=False)
    )
    return {
        id(each): module for each, module in owned if each.ndim == 3 and each.dtype == dtype and not each.requires_grad
    }


def _by_groups(module: nn.Module) -> bool:
    """Whether it is transformers' experts, computed by the grouped product that `follow_autocast` knows."""
    kind = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return kind == "grouped_mm" and hasattr(module, "is_transposed")


def _follows(weight: torch.Tensor) -> bool:
    """Whether a grouped product with a weight is in the precision of autocast."""
    return kind_of(weight) == "cuda" and torch.is_autocast_enabled(weight.device.type)


def follow_autocast() -> None:
    """Let the grouped product of transformers' experts compute on CUDA in the precision of autocast, as linear layers do.

    torch has no rule for it, and in float32 no kernel: it goes through the experts one by one, and waits for the device. On a CPU
    it computes in float32, as ever. Gradients of float32 weights are float32. Layers in shards are gathered in half precision.
    """
    from transformers.integrations import moe

    functions: Any = moe
    own = getattr(functions, "_grouped_mm", None)
    if own is None or hasattr(own, "__wrapped__"):
        return

    @wraps(own)
    def grouped(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> Any:
        if _follows(weight):
            dtype = torch.get_autocast_dtype(weight.device.type)
            input, weight = input.to(dtype), weight.to(dtype)
        return own(input, weight, offs)

    functions._grouped_mm = grouped


def _widen(module: nn.Module, inputs: Any) -> None:
    """Let a module's code find its stacked weights in float32, unless their product follows autocast."""
    for name, weight in module.named_parameters(recurse=False):
        if weight.ndim == 3 and not (_follows(weight) and _by_groups(module)):
            vars(module)[name] = weight.float()


def _narrow(module: nn.Module, inputs: Any, output: Any) -> None:
    for name, _ in module.named_parameters(recurse=False):
        vars(module).pop(name, None)


def _may_be_half(model: nn.Module, asked: Iterable[nn.Parameter]) -> set[int]:
    """The ids of those of the parameters that only linear layers multiply by; an embedding may look up the same ones.

    Of trained ones also those that an embedding alone looks up.
    """
    linear: set[int] = set()
    others: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # code of a subclass may do more with a weight than multiply by it
            if name == "weight" and is_linear(module):
                linear.add(id(parameter))
            elif name != "weight" or type(module) is not nn.Embedding or module.max_norm is not None:
                others.add(id(parameter))
    return {id(each) for each in asked if id(each) not in others and (id(each) in linear or each.requires_grad)}


def _look_up(embedding: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    """(..., width) float32. ids: (...), of an embedding in half precision."""
    apply: Any = _LookUp.apply
    found: torch.Tensor = apply(ids, embedding.weight, embedding.padding_idx)
    return found


class _LookUp(torch.autograd.Function):
    """Rows of a table in half precision, as float32. The gradients of a row are added in float32, and rounded once.

    In bfloat16 the sum over a frequent token would stand still: 256 + 1 is 256.
    """

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding: int | None) -> torch.Tensor:
        found = functional.embedding(ids, weight)
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype, ctx.padding = weight.shape[0], found.dtype, -1 if padding is None else padding
        return found.float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (ids,) = ctx.saved_tensors
        sums = torch.ops.aten.embedding_dense_backward(grads[0], ids, ctx.rows, ctx.padding, False)
        return None, sums.to(ctx.dtype), None


class Settling(TorchFunctionMode):
    """Within it a model is run once without autocast: its half weights compute in the precision of their input.

    A weight that the model's code reads past its layer (`layer.weight @ hidden`, `hidden.to(layer.weight.dtype)`) becomes float32
    for good: what the code makes of its precision is not known.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        half = [each for each in model.parameters() if each.dtype in HALF]
        may = _may_be_half(model, half) | {id(each) for each in half if each.ndim == 3}
        self.half = {id(each): each for each in half if id(each) in may}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            args = (args[0], args[1].to(args[0].dtype), *args[2:])
        elif func is torch.addmm:
            # GPT-2's layer: (bias, hidden, weight)
            args = (*args[:2], args[2].to(args[1].dtype))
        elif func is not functional.embedding and _name(func) not in HARMLESS:
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
    half = [each for each in model.parameters() if each.dtype in HALF]
    stored = [each.data for each in half]
    try:
        for each in half:
            each.data = torch.zeros(1, device=each.device).expand(each.shape)
        yield
    finally:
        for each, data in zip(half, stored, strict=True):
            each.data = data
