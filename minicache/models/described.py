"""Whether what a config describes can be: transformers makes lists, modules and random weights of its numbers before any check."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minicache.errors import ModelError
from minicache.models.directories import broken_file

# Numbers by which transformers makes lists or modules, and more than any language model has.
COUNTS = re.compile(r"n_layers?|num(_\w+)?_layers|(encoder|decoder)_layers|(num|n)(_\w+)?_experts|num_labels")
MOST_COUNTED = 10_000
# Weights that fit any machine: of a small model the mismatch itself is named, after loading.
FEW = 2**28
# The smallest type of weights is float8; quantized ones, and those of a .gguf, take more than one bit.
WEIGHTS_A_BYTE, QUANTIZED_A_BYTE = 1, 8


def require_countable(source: str, settings: Any) -> None:
    """Require that the numbers of layers and the like in a config.json can be counted to.

    Raises:
        ModelError: one cannot.
    """
    for name, value in _entries(settings):
        if COUNTS.fullmatch(name) and isinstance(value, int) and value > MOST_COUNTED:
            raise ModelError(f"{source}: its config.json says {name} {value:,}; expected at most {MOST_COUNTED:,}")


def _entries(settings: Any) -> Iterator[tuple[str, Any]]:
    """The entries of a JSON object, and of all objects in it."""
    waiting = [settings]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield from each.items()
        waiting += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()


def require_held(source: str, config: Any) -> None:
    """Require that the files of a directory, or a .gguf file, are large enough for the model that the config describes.

    transformers would fill what they lack with random numbers, at the size that the config says. A model of the hub, and one whose
    class is not transformers' own, are loaded as they are.

    Raises:
        ModelError: they are too small by far.
    """
    path = Path(source)
    files = [path] if path.is_file() else [file for end in ("safetensors", "bin") for file in path.glob(f"*.{end}")]
    held = sum(file.stat().st_size for file in files if file.is_file())
    if not held:
        return
    config = copy.deepcopy(config)
    is_quantized = drop_quantization(config) or path.is_file()
    described = _described(config)
    if described > FEW + held * (QUANTIZED_A_BYTE if is_quantized else WEIGHTS_A_BYTE):
        if path.is_dir() and (problem := broken_file(path)):
            raise ModelError(problem)
        of = "it" if path.is_file() else "its config.json"
        raise ModelError(
            f"{source}: {of} describes a model of {described:,} weights, and its weights take {held:,} bytes; expected those of "
            "one model"
        )


def drop_quantization(config: Any) -> bool:
    """Take `quantization_config` out of a config and of the one in it that is about text; returns whether there was one."""
    found = [vars(part).pop("quantization_config", None) for part in (config, config.get_text_config())]
    return any(each is not None for each in found)


def without_weights(config: Any, **options: Any) -> nn.Module:
    """The model of this config on the device `meta`: names and shapes. options: of `from_config`, which may raise anything."""
    from transformers import AutoModelForCausalLM

    family: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = family.from_config(config, **options)
    return model


def _described(config: Any) -> int:
    """The number of weights of the model of this config; 0 if its class is not transformers' own or cannot be built."""
    from transformers import AutoModelForCausalLM

    family: Any = AutoModelForCausalLM
    if type(config) not in family._model_mapping:
        return 0
    try:
        model = without_weights(config)
    # loading says what is wrong: a family's own code may raise anything
    except Exception:
        return 0
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
