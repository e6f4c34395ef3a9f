"""Small random checkpoints of each generation, in its own keys, as its own code saves them."""

from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from tests.references import minimind2_2504, minimind2_2510, minimind3
from tests.references.formulas import State

REFERENCES: dict[str, ModuleType] = {
    "minimind2-2504": minimind2_2504,
    "minimind2-2510": minimind2_2510,
    "minimind3": minimind3,
}
GENERATIONS = list(REFERENCES)
NAMES = [f"{generation}-{kind}" for generation in GENERATIONS for kind in ("dense", "moe")]
MIXTURES = [name for name in NAMES if name.endswith("moe")]
VOCABULARY, EXPERTS = 400, 4


def reference_of(name: str) -> ModuleType:
    """The reference of "minimind3-moe" and the like."""
    return REFERENCES[name.rpartition("-")[0]]


def draw(name: str, seed: int = 0, shared: int = 1, tied: bool = True) -> State:
    """A checkpoint of two layers, 64 wide, in float32: every tensor matters, norms differ from 1, and experts are chosen clearly.

    shared: experts for every token, where the generation has such. tied: the head's tensor is the embedding's, as in the originals.
    """
    shapes = reference_of(name).shapes(EXPERTS if name.endswith("moe") else 0, shared, VOCABULARY)
    random = np.random.default_rng(seed)
    state = {key: _draw(random, key, shape) for key, shape in shapes.items()}
    if tied:
        first, *_, last = state
        state[last] = state[first]
    return state


def _draw(random: np.random.Generator, key: str, shape: tuple[int, ...]) -> Tensor:
    values = random.standard_normal(shape)
    if len(shape) == 1:
        values = 1 + 0.2 * values
    else:
        values *= 0.1 if shape[0] == VOCABULARY else 2 / 8 if key.endswith("gate.weight") else shape[1] ** -0.5
    return torch.from_numpy(values.astype(np.float32))


def save_all(directory: Path) -> Path:
    """Write a checkpoint of each of `NAMES` as `name`.pth. Returns the directory."""
    for name in NAMES:
        torch.save(draw(name), directory / f"{name}.pth")
    return directory


def some_ids(seed: int = 2) -> Tensor:
    """(2, 48) token ids. With the default seed no checkpoint has two experts so alike that rounding could choose between them."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCABULARY, (2, 48)))
