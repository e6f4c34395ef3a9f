"""The errors of our float32 values and gradients against a plain computation in float64: one sequence at a time, full logits.

transformers computes norms and rotary angles in float32 in any precision of the weights, so the reference is exact to about 1e-7.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from benchmarks.case import BETA, Case, Optimizer
from benchmarks.ours import Ours
from minicache.cache.schema import CachedPairs, RefBlock


@dataclass(frozen=True)
class Errors:
    """values: largest |difference| of a mean logprob, nats per token. gradients: |difference| / |gradient|, over all weights."""

    values: float
    gradients: float


def errors(case: Case) -> Errors:
    """The errors of the values of two short pairs and of the gradients of the shortest; leaves no gradient on the model."""
    case = replace(case, dtype="float32", table=_take(case))
    ours = Ours(case, Optimizer(case.model))
    found = ours.reference()
    plain = copy.deepcopy(case.model).double()
    expected = np.array([[_logp(plain, case, pair, side).item() for side in (0, 1)] for pair in (0, 1)])
    # a reference that differs from the policy, so that the gradient depends on the margin
    reference = found + np.array([0.5, -0.5], np.float32)
    ours.cached = CachedPairs(case.table, RefBlock(reference, case.table.token_counts))
    ours.accumulate(np.array([0]))
    chosen, rejected = (_logp(plain, case, 0, side) - float(reference[0, side]) for side in (0, 1))
    (-logsigmoid(BETA * (chosen - rejected))).backward()
    return Errors(float(np.abs(found - expected).max()), _relative(case.model, plain))


def _take(case: Case) -> Any:
    return type(case.table).from_pairs(case.table.take(case.shortest), "int32")


def _logp(model: Any, case: Case, pair: int, side: int) -> torch.Tensor:
    """() float64: the mean logprob of one side."""
    ids, mask = (torch.tensor(part.astype(np.int64), device=case.device) for part in case.table[pair].side(side))
    logps = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return logps[mask[1:] > 0].mean()


def _relative(model: Any, plain: Any) -> float:
    difference = norm = 0.0
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        difference += float((ours.grad.double() - expected.grad).square().sum())
        norm += float(expected.grad.square().sum())
        ours.grad = None
    return (difference / norm) ** 0.5
