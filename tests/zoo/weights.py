"""A random model of a family, saved as a user has it: every weight far enough from zero that it shows in the logits."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.zoo.families import Family, tiny_config

# Standard deviation of a matrix whose own initialisation is smaller, larger than is usual, or missing; of the noise on the rest.
SPREAD, NOISE = 0.1, 0.05
LEAST, MOST = 0.05, 3.0


def save_tiny(family: Family, tokenizer: Path, directory: Path) -> Any:
    """Write a random model of the family with a tokenizer; returns the model, float32."""
    with nothing_left_to_chance():
        model = make(family)
    perturb(model)
    model.eval().save_pretrained(directory)
    for file in tokenizer.iterdir():
        shutil.copy(file, directory)
    return model


def make(family: Family) -> Any:
    """A model of the class that a checkpoint of this family names."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    config = tiny_config(family)
    autos: tuple[Any, ...] = (AutoModelForSeq2SeqLM, AutoModelForImageTextToText, AutoModelForCausalLM)
    for auto in autos:
        if type(config) in auto._model_mapping:
            return auto.from_config(config)
    raise KeyError(family.kind)


@contextmanager
def nothing_left_to_chance() -> Iterator[None]:
    """Memory that a class leaves uninitialised is NaN, so that `perturb` finds it; random numbers are the same every time."""
    torch.manual_seed(0)
    # With these, torch fills new memory with NaN by default (torch.utils.deterministic.fill_uninitialized_memory).
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
def perturb(model: torch.nn.Module) -> None:
    """Add noise to norms, biases and sinks, and draw anew the matrices that are nearly zero, very large, or not initialised.

    Tables among the buffers, such as MiniMax's decays, are computed and stay.
    """
    stored = model.state_dict().keys()
    random = torch.Generator().manual_seed(1)
    buffers = [buffer for name, buffer in model.named_buffers() if name in stored and buffer.ndim < 2]
    for tensor in [*model.parameters(), *buffers]:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=random)
        known = bool(tensor.isfinite().all())
        if tensor.ndim >= 2 and not (known and LEAST <= tensor.std() <= MOST):
            tensor.copy_(SPREAD * noise)
        else:
            tensor.copy_(torch.where(tensor.isfinite(), tensor, 0.0) + NOISE * noise)
