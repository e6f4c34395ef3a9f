"""Models whose linear layers are held in 4 or 8 bits by bitsandbytes: made, cast, computed with, turned back.

4 bits: NF4 with double quantization. Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314.
8 bits: the rows of LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339), with activations in the precision of the passes. LLM.int8
itself rounds activations too, except in columns that hold an outlier anywhere in the batch: a pair's logprob would then depend on
the pairs beside it (by 0.05 nats per token with SmolLM2-135M), and the policy would differ from itself as the reference.
"""

import copy
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import prod
from types import MethodType
from typing import Any

import torch
from torch import nn

from minicache.errors import ModelError
from minicache.models.peft_library import quiet_kernels
from minicache.options.base import flag_of

# What a weight stored in int8 is divided by after it was multiplied by the largest weight of its row.
MOST_INT8 = 127


def quantize(model: nn.Module, quantization: str) -> None:
    """Hold the model's linear layers in this quantization, layer by layer, in place and on the CPU, without the output layer.

    The layers are those that transformers' `BitsAndBytesConfig` would choose, and so is their content.

    Raises:
        ModelError: bitsandbytes is not installed, or the model has no linear layers.
    """
    require_packages(flag_of(quantization))
    quiet_kernels()
    bnb = import_module("bitsandbytes")
    linear = quantizable(model)
    if not linear:
        raise ModelError(
            f"{flag_of(quantization)}: {type(model).__name__} has no linear layers beside the output layer; leave it out"
        )
    for name in list(linear):
        layer = _layer(bnb, linear.pop(name), quantization)
        model.set_submodule(name, prepared(layer))
    # peft chooses its kind of adapter by these marks, which transformers sets
    setattr(model, f"is_loaded_in_{'4' if quantization == 'nf4-double' else '8'}bit", True)


def quantizable(model: nn.Module) -> dict[str, Any]:
    """The linear layers that `quantize` would convert, by name."""
    left_out = _left_out(model)
    return {
        name: module for name, module in model.named_modules() if is_linear(module) and _is_converted(name, left_out)
    }


def quantized_layers(model: nn.Module) -> list[Any]:
    """The layers of the model that bitsandbytes holds."""
    bnb = sys.modules.get("bitsandbytes")
    return [each for each in model.modules() if isinstance(each, _kinds(bnb))] if bnb else []


def is_quantized(model: nn.Module) -> bool:
    """Whether some of the model's weights are quantized."""
    return bool(quantized_layers(model))


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let quantized layers compute in this precision, forward and backward, whatever the checkpoint asks for."""
    for layer in quantized_layers(model):
        layer.compute_dtype = dtype


def plain(model: nn.Module) -> nn.Module:
    """The model with plain linear layers, and then float32, in place of quantized ones. It holds what these compute with."""
    layers = {layer: name for name, layer in model.named_modules() if layer in set(quantized_layers(model))}
    if not layers:
        return model
    for layer, name in layers.items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(_weight(layer, torch.float32), requires_grad=False), layer.bias
        model.set_submodule(name, linear)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(mark, None)
    return model.to(torch.float32)


def weight_count(parameter: torch.Tensor) -> int:
    """The number of weights in a parameter; one in 4 bits packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def require_packages(what: str) -> None:
    """Raises ModelError, which begins with `what`: bitsandbytes or accelerate is not installed."""
    if any(find_spec(package) is None for package in ("bitsandbytes", "accelerate")):
        raise ModelError(f"{what}: needs two more packages: pip install 'minidpo[quantized]'")


def prepared(layer: Any) -> Any:
    """The quantized layer, computing in the precision of its input, in the same way with gradients and without.

    bitsandbytes' own forward packs weights on some CPUs, and computes in bfloat16 then, without gradients.

    Raises:
        ModelError: the layer is of a kind that gives no gradients.
    """
    if not hasattr(layer.weight, "quant_state"):
        if layer.weight.dtype != torch.int8:
            raise ModelError("its 8-bit layers hold float weights (llm_int8_has_fp16_weight); expected int8 ones")
        # As a buffer they move with the layer; what bitsandbytes keeps at the weight would stay behind.
        layer.register_buffer("largest", layer.weight.SCB, persistent=False)
        layer.weight.CB = None
    layer.compute_dtype = None
    layer.dense, layer.forward = MethodType(_weight, layer), MethodType(_forward, layer)
    return layer


class _Product(torch.autograd.Function):
    """hidden @ weight.T, which keeps the quantized weight and not a float copy of it for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, layer: Any) -> torch.Tensor:
        """(..., out). hidden: (..., in)."""
        ctx.layer = layer
        weight: torch.Tensor = layer.dense(hidden.dtype)
        return hidden @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.layer.dense(grads[0].dtype), None


def _forward(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """(..., out) in the precision of hidden, (..., in)."""
    apply: Any = _Product.apply
    output: torch.Tensor = apply(hidden.to(layer.compute_dtype or hidden.dtype), layer)
    return (output if layer.bias is None else output + layer.bias.to(output.dtype)).to(hidden.dtype)


def stand_in(layer: Any, sizes: tuple[int, int]) -> None:
    """Let a layer whose weight has no content compute as a quantized one does. sizes: (out, in)."""
    layer.dense, layer.forward = partial(_without_content, layer, sizes), MethodType(_forward, layer)


def _without_content(layer: Any, sizes: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device=layer.weight.device)


def _weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """(out, in): the weights that the layer computes with."""
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        plain: torch.Tensor = layer.weight.data * (layer.largest[:, None] / MOST_INT8)
        return plain.to(dtype)
    # As one row: where rows are no multiple of a block, the kernel of bitsandbytes 0.50 for CPUs with AVX-512 scales them wrongly.
    flat = copy.copy(state)
    flat.shape, flat.dtype = (prod(state.shape),), dtype
    weight: torch.Tensor = dequantize_4bit(layer.weight.data, flat)
    return weight.view(state.shape)


def _layer(bnb: Any, plain: Any, quantization: str) -> Any:
    """The quantized layer in place of a plain one, or of GPT-2's transposed one."""
    weight = plain.weight.data if isinstance(plain, nn.Linear) else plain.weight.data.T.contiguous()
    sizes = {"input_features": weight.shape[1], "output_features": weight.shape[0], "bias": plain.bias is not None}
    if quantization == "nf4-double":
        layer = bnb.nn.Linear4bit(**sizes, quant_type="nf4", compress_statistics=True, device="meta")
        empty = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer)
    else:
        layer = bnb.nn.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=0.0, device="meta")
        empty = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    # a parameter of bitsandbytes quantizes its content when it is sent to a device
    layer.weight, layer.bias = empty.to("cpu"), plain.bias
    return layer


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer: torch's, or GPT-2's, whose weight is transposed. Not a subclass."""
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D)


def _left_out(model: Any) -> list[str]:
    """Patterns of the names of modules that transformers leaves as they are: the output layer and what is tied to it."""
    from transformers.quantizers.base import HfQuantizer

    names: list[str] = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return names


def _is_converted(name: str, left_out: list[str]) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return bool(should_convert_module(name, left_out))


def _kinds(bnb: Any) -> tuple[type, ...]:
    return bnb.nn.Linear4bit, bnb.nn.Linear8bitLt
