"""Losses, metrics and the learning rate against their formulas written out."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from minicache.errors import ConfigError
from minicache.losses import LOSSES, find_loss
from minicache.metrics import NAMES, pair_metrics
from minicache.optim import cosine_with_warmup, make_optimizer
from minicache.scoring import PairScores


def random_scores(count: int = 50) -> tuple[PairScores, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 40, (count, 2), generator=generator).float()
    sums = -3 * counts * torch.rand(count, 2, generator=generator)
    reference = -3 * torch.rand(count, 2, generator=generator)
    return PairScores(sums, counts, torch.empty(0)), reference


def test_sigmoid_is_the_formula_in_float64() -> None:
    scores, reference = random_scores()
    policy = scores.logp_mean
    p, r = policy.double().numpy(), reference.double().numpy()
    margin = (p[:, 0] - r[:, 0]) - (p[:, 1] - r[:, 1])
    assert np.allclose(LOSSES["sigmoid"](policy, reference, 0.3), np.log1p(np.exp(-0.3 * margin)), atol=1e-6)


def test_loss_is_ln_2_where_policy_and_reference_agree() -> None:
    scores, _ = random_scores()
    losses = LOSSES["sigmoid"](scores.logp_mean, scores.logp_mean.clone(), 0.1)
    assert torch.allclose(losses, torch.full_like(losses, math.log(2)))


def test_sigmoid_does_not_overflow() -> None:
    far = torch.tensor([[-1e4, 0.0], [0.0, -1e4]])
    assert torch.isfinite(LOSSES["sigmoid"](far, torch.zeros(2, 2), 1.0)).all()


def test_an_unknown_loss_names_the_known() -> None:
    with pytest.raises(ConfigError, match="sigmoid"):
        find_loss("sigmiod")


@pytest.mark.parametrize("logps", ["mean", "sum"])
def test_metrics_are_their_definitions(logps: str) -> None:
    scores, ref_mean = random_scores()
    policy, reference = scores.logp_mean, ref_mean
    if logps == "sum":
        policy, reference = scores.logp_sum, ref_mean * scores.token_count
    losses = LOSSES["sigmoid"](policy, reference, 0.2)
    values = dict(zip(NAMES, pair_metrics(losses, scores, policy, reference, 0.2).numpy(), strict=True))
    p, r = policy.double().numpy(), reference.double().numpy()
    assert np.allclose(values["rewards/margin"], 0.2 * ((p - r)[:, 0] - (p - r)[:, 1]), atol=1e-5)
    assert np.array_equal(values["rewards/accuracy"], (p - r)[:, 0] > (p - r)[:, 1])
    assert np.array_equal(values["accuracy/policy"], p[:, 0] > p[:, 1])
    assert np.array_equal(values["accuracy/reference"], r[:, 0] > r[:, 1])
    d = scores.logp_mean.double().numpy() - ref_mean.double().numpy()
    assert np.allclose(values["kl"], (np.exp(-d) - 1 + d).mean(1), rtol=1e-3, atol=1e-5)
    assert (values["kl"] >= 0).all()


def test_learning_rate_rises_then_falls_and_never_stops() -> None:
    rates = [cosine_with_warmup(step, 100, 1e-3, 0.1) for step in range(100)]
    assert rates[9] == pytest.approx(1e-3) and max(rates) == pytest.approx(1e-3)
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[0] > 0 and 0 < rates[-1] < 1e-5
    assert cosine_with_warmup(0, 1, 1e-3, 0.0) == pytest.approx(1e-3)


def test_norms_and_biases_do_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    groups = make_optimizer(model, 1e-3, 0.1).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]
