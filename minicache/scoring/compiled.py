"""torch.compile for the layers of a decoder."""

import os
import shutil

import torch
from torch.utils._triton import has_triton

from minicache.errors import ConfigError
from minicache.models import layers_of
from minicache.scoring.probe import decoder_of
from minicache.scoring.scorer import Scorer


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError: torch's compiler lacks what it needs for the device."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise ConfigError("--compile: expected a C++ compiler, g++ or clang++, found none; install one or leave it off")
    if device.type in ("cuda", "xpu") and not has_triton():
        raise ConfigError(
            f"--compile: expected Triton for {device.type}, found none; pip install triton (on Windows triton-windows), or leave "
            "it off"
        )


def compile_layers(scorer: Scorer) -> None:
    """Compile each layer of the decoder. Layers that are alike share what is compiled, for rows of any length.

    A model that does not mark its layers is compiled whole. The head is not: its number of positions differs in every batch.
    """
    for module in layers_of(scorer.model) or [decoder_of(scorer.model)]:
        module.compile(dynamic=True)
