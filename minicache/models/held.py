"""How a loaded model holds its weights: as they are stored, or quantized now."""

from torch import nn

from minicache.errors import ModelError
from minicache.models import lora, quantized
from minicache.models.adapter_places import adapter_place
from minicache.models.fingerprint import fingerprint
from minicache.options.base import flag_of


def hold(model: nn.Module, source: str, quantization: str) -> str | None:
    """Hold the model's linear layers in this quantization, "" for as they are stored.

    Returns:
        The digest of the weights: before they were quantized now, or as they are stored quantized; None for plain ones.

    Raises:
        ModelError: it is quantized in another way, or cannot be.
    """
    if quantized.is_quantized(model):
        adapter = adapter_place(source)
        if quantization and not (adapter and lora.quantization_of(adapter) == quantization):
            raise ModelError(f"{source}: its weights are quantized already; leave {flag_of(quantization)} out")
        return fingerprint(model)
    if not quantization:
        return None
    weights = fingerprint(model)
    quantized.quantize(model, quantization)
    return weights
