"""Checkpoints that are stored quantized: what transformers is asked for, and what comes of it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from torch import nn

from minicache.errors import ModelError
from minicache.models.quantized import prepared, quantized_layers, require_packages
from minicache.text import one_line

BITSANDBYTES = "bitsandbytes"
# Methods that transformers turns back into plain weights while it loads, on every device. quant_method in config.json -> its class.
PLAIN_WHEN_LOADED = {
    "mxfp4": "Mxfp4Config",
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "compressed-tensors": "CompressedTensorsConfig",
    "metal": "MetalConfig",
}
# Its tensors are turned back after loading.
TORCHAO = "torchao"
INSTEAD = "expected an unquantized copy of the model, which --base-4bit holds in 4 bits"
OR = "an unquantized copy of the model needs nothing"


def loading_options(source: str, config: Any) -> dict[str, Any]:
    """The options with which transformers loads the model of this config; {} for one that is not stored quantized.

    Raises:
        ModelError: it is stored in a way that minidpo cannot train on, or a package is missing.
    """
    stored = quantization_of(config)
    if not stored:
        return {}
    method = method_of(stored)
    if method == BITSANDBYTES:
        require_packages(f"{source}: is stored quantized by bitsandbytes")
        # by itself transformers would put it on a GPU
        return {"device_map": {"": "cpu"}}
    if method in PLAIN_WHEN_LOADED:
        return {"quantization_config": _plain_when_loaded(source, method, stored)}
    if method == TORCHAO and find_spec(TORCHAO):
        return {}
    if method == TORCHAO:
        raise ModelError(f"{source}: is stored quantized by torchao, which is not installed: pip install torchao; {OR}")
    raise ModelError(f"{source}: is stored quantized by {method}, which minidpo cannot train on; {INSTEAD}")


def quantization_of(config: Any) -> dict[str, Any]:
    """The `quantization_config` of a config or of the one in it that is about text; {} if it has none."""
    parts = (config, config.get_text_config())
    stored: Any = next(filter(None, (getattr(part, "quantization_config", None) for part in parts)), {})
    return dict(stored if isinstance(stored, dict) else stored.to_dict())


def settle(model: Any, source: str) -> None:
    """Prepare a loaded model for training, if it is quantized; drop the marks by which transformers forbids to move or save it.

    Raises:
        ModelError: it is quantized in a way that minidpo cannot train on.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return
    layers = quantized_layers(model)
    if method_of(config.to_dict()) == TORCHAO:
        turn_back(model)
    elif not layers:
        raise ModelError(
            f"{source}: transformers loads it quantized by {method_of(config.to_dict())}, which minidpo cannot train on; {INSTEAD}"
        )
    for layer in layers:
        try:
            prepared(layer)
        except ModelError as error:
            raise ModelError(f"{source}: {error}; {INSTEAD}") from error
    model.hf_quantizer, model.is_quantized = None, False
    vars(model).pop("quantization_method", None)
    vars(model.config).pop("quantization_config", None)
    # those of bitsandbytes' tensors cannot be reverted, and what is saved has none
    kept = [each for each in getattr(model, "_weight_conversions", None) or () if not _is_of_quantizer(each)]
    model._weight_conversions = kept or None


def _is_of_quantizer(conversion: Any) -> bool:
    return any(hasattr(step, "hf_quantizer") for step in getattr(conversion, "operations", ()))


def turn_back(model: nn.Module) -> None:
    """Put the weights that torchao's tensors stand for in their place."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if type(weight) is not nn.Parameter:
                setattr(module, name, nn.Parameter(weight.dequantize(), requires_grad=False))


def _plain_when_loaded(source: str, method: str, stored: dict[str, Any]) -> Any:
    """The settings with which transformers turns the weights back. Raises ModelError: it lacks a package, or they are damaged."""
    import transformers

    try:
        return getattr(transformers, PLAIN_WHEN_LOADED[method]).from_dict({**stored, "dequantize": True})
    # the class checks its settings and imports the method's own library
    except Exception as error:
        line = one_line(error, 200).rstrip(".")
        raise ModelError(f"{source}: is stored quantized by {method}: {line}; {OR}") from error


def method_of(stored: dict[str, Any]) -> str:
    """The name of the method in a `quantization_config`."""
    named = stored.get("quant_method")
    if named is None and (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        return BITSANDBYTES
    return "a method that config.json does not name" if named is None else str(getattr(named, "value", named))


@contextmanager
def quietly(source: str) -> Iterator[None]:
    """Hide transformers' warning that a quantization was given for a model that has one: it is the same.

    Raises:
        ModelError: in place of the one that refers to a report on the screen, which is not shown.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        try:
            yield
        except ModelError as error:
            if "automatic conversion" not in str(error):
                raise
            raise ModelError(
                f"{source}: its quantized weights cannot be read: a scale or another part of one is missing or damaged; {OR}"
            ) from error
