"""A model as its config describes it, without weights: names, shapes and precisions on the device `meta`. Nothing is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minicache.errors import ModelError
from minicache.models import huggingface, lora
from minicache.models.adapter_places import adapter_place, base_name
from minicache.models.described import drop_quantization, without_weights
from minicache.models.load import FAMILIES, split_source
from minicache.models.precision import hold_for
from minicache.models.quantized import quantizable, stand_in
from minicache.models.stored import BITSANDBYTES, loading_options, method_of, quantization_of
from minicache.models.whole import beside_text, require_language_model
from minicache.options.lora import LoraOptions
from minicache.text import one_line
from minicache.trackers import Silent

META = torch.device("meta")
# Bytes beside a weight in 4 bits: a scale in 8 bits for 64 weights, and one in 32 bits for 256 of those.
NF4_SCALES = 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Outline:
    """model: a transformers model on `meta`, in the precision it is stored in. quantization: in which it is stored, or ""."""

    model: nn.Module
    quantization: str = ""


def outline_of(source: str, trust_remote_code: bool = False) -> Outline:
    """The outline of what `load_model` would load.

    Raises:
        ModelError: there is no such model, or its class cannot be built.
    """
    if adapter := adapter_place(source):
        below = outline_of(base_name(adapter), trust_remote_code)
        if quantization := below.quantization or lora.quantization_of(adapter):
            return replace(below, quantization=quantization)
        # merged in float32
        return Outline(below.model.to(torch.float32))
    place, options = split_source(source)
    path = Path(place)
    if path.suffix in FAMILIES:
        # such a file is small, mapped into memory, and its shapes are its config
        return Outline(FAMILIES[path.suffix](path, options)[0].to(META))
    return _from_config(source, trust_remote_code)


def _from_config(source: str, trust_remote_code: bool) -> Outline:
    from transformers import AutoConfig

    config = huggingface.from_pretrained(AutoConfig, source, trust_remote_code)
    require_language_model(source, config)
    text = config.get_text_config()
    quantization = ""
    if stored := quantization_of(config):
        if method_of(stored) == BITSANDBYTES:
            quantization = "nf4-double" if stored.get("load_in_4bit") else "int8"
        else:
            # refuses what cannot be loaded
            loading_options(source, config)
        drop_quantization(config)
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    try:
        with huggingface.without_reports():
            model = without_weights(config, dtype=dtype, trust_remote_code=trust_remote_code)
    # a family's own code may raise anything
    except Exception as error:
        raise ModelError(f"{source}: its class cannot be built from its config: {one_line(error, 300)}") from error
    return Outline(model.eval(), quantization)


def held_for(
    outline: Outline,
    options: LoraOptions,
    quantization: str,
    dtype: str,
    trained: bool,
    weights: str = "float32",
) -> nn.Module:
    """The outline's model as a stage holds it: with adapters, its base quantized, and the gradients it will have.

    The model is changed. dtype: of the passes. trained: stage two; else stage one.
    weights: precision of those that are trained, without adapters.

    Raises:
        ConfigError: peft is not installed, or the model has no such modules.
    """
    model = outline.model.requires_grad_(False)
    quantization = quantization or outline.quantization
    layers = list(quantizable(model).values()) if quantization else []
    if options.lora_rank and trained:
        model = lora.add_lora(model, "", options, 0, Silent())
    elif trained:
        frozen = set(beside_text(model))
        for name, weight in model.named_parameters():
            weight.requires_grad_(name not in frozen)
    for layer in layers:
        _quantize(layer, quantization, getattr(torch, dtype))
    return hold_for(model, META, dtype, weights)


def _quantize(layer: Any, quantization: str, dtype: torch.dtype) -> None:
    """Give a linear layer a weight of as many bytes as bitsandbytes would."""
    # GPT-2's layer is transposed
    sizes = tuple(layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape)
    numbers = sizes[0] * sizes[1]
    size = numbers * (0.5 + NF4_SCALES) if quantization == "nf4-double" else numbers + 4 * max(sizes)
    layer.weight = nn.Parameter(torch.empty(int(size), dtype=torch.uint8, device=META), requires_grad=False)
    layer.compute_dtype = dtype
    stand_in(layer, sizes)
