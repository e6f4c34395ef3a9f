"""A family's frozen weights held in the half precision they are stored in, beside the same numbers cast to float32."""

from copy import deepcopy
from typing import Any

import numpy as np
import torch

from minicache.models.lora import add_lora
from minicache.models.precision import hold_for, to_float32
from minicache.options.train import LoraOptions
from minicache.pairs import PairTable
from minicache.processes.world import World
from minicache.scoring.layout import settle_layout
from minicache.scoring.scorer import Scorer
from minicache.trackers import Silent

CPU = torch.device("cpu")
PAIRS = 4


def compare_half(model: Any, table: PairTable, dtype: str = "bfloat16") -> dict[str, Any]:
    """The share of the weights that stays in half precision, and which outputs are others in any bit than in float32.

    model: it is cast to `dtype`, as if it were stored so. Outputs: scores and entropies; with adapters their gradients too.
    """
    stored = model.eval().requires_grad_(False).to(getattr(torch, dtype))
    held = hold_for(deepcopy(stored), CPU, dtype)
    wide, narrow = _scored(to_float32(deepcopy(stored), CPU), table, dtype), _scored(held, table, dtype)
    kept = [each.numel() for each in held.parameters() if each.dtype != torch.float32]
    share = sum(kept) / sum(each.numel() for each in held.parameters())
    found: dict[str, Any] = {"share": share, "scores": _differing(wide, narrow)}
    wide = _scored(_with_adapters(to_float32(deepcopy(stored), CPU)), table, dtype)
    narrow = _scored(hold_for(_with_adapters(stored), CPU, dtype), table, dtype)
    return found | {"gradients": _differing(wide, narrow)}


def _with_adapters(base: Any) -> Any:
    return add_lora(base, "base", LoraOptions(lora_rank=4), 0, Silent())


def _scored(model: Any, table: PairTable, dtype: str) -> dict[str, torch.Tensor]:
    """The outputs for a few pairs, by name, in the layout that stage one would choose; with adapters also what they are made of."""
    scorer = Scorer(model, dtype)
    settle_layout(scorer, table, "auto", World(0, 1, CPU), Silent())
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    values = {name: each.detach().clone() for name, each in trained.items()}
    torch.manual_seed(1)
    for each in trained.values():
        # a second factor of zeros would hide the gradient of the first
        each.data += 0.1 * torch.randn(each.shape)
    scores = scorer(scorer.layout.make(table, np.arange(PAIRS)), distribution=True)
    if trained:
        scores.logp_sum.sum().backward()
        values |= {f"{name}'s gradient": each.grad for name, each in trained.items() if each.grad is not None}
    of_pairs = ("logp_sum", "token_logps", "entropy", "alignment")
    return values | {name: getattr(scores, name).detach() for name in of_pairs}


def _differing(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    names = sorted(expected.keys() | found.keys())
    return [
        name
        for name in names
        if name not in expected or not torch.equal(expected[name], found.get(name, torch.empty(0)))
    ]
