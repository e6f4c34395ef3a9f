"""Losses, metrics and the learning rate against their formulas written out."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from minicache.errors import ConfigError
from minicache.options.catalog import LOSSES, SCHEDULES
from minicache.options.train import LossOptions
from minicache.scoring.scorer import PairScores
from minicache.training.losses import Logps, Objective, loss_named
from minicache.training.metrics import COUNTS, NAMES, Means, pair_metrics
from minicache.training.optim import make_optimizer
from minicache.training.schedules import beta_at, learning_rate, warmup_steps
from tests.conftest import one_process


def random_logps(averaged: bool, count: int = 50) -> Logps:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40, (count, 2), generator=generator).float()
    policy = -3 * torch.rand(count, 2, generator=generator)
    reference = policy + 0.1 * torch.randn(count, 2, generator=generator)
    return (
        Logps(policy, reference, tokens, True)
        if averaged
        else Logps(policy * tokens, reference * tokens, tokens, False)
    )


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(-np.logaddexp(0, -x))


def sigma(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(log_sigmoid(x)))


DIVERGENCE = {
    "reverse_kl": lambda r, a: r,
    "forward_kl": lambda r, a: 1 - np.exp(-r),
    "js": lambda r, a: np.log(2) + log_sigmoid(r),
    "alpha": lambda r, a: (np.exp(np.minimum(r * (a - 1), 80)) - 1) / (a - 1),
}


def written_out(name: str, logps: Logps, beta: float, o: LossOptions) -> np.ndarray:
    """Every loss as TRL 1.16 states it, in float64 and in one place, independent of the code under test."""
    p, r, n = (values.double().numpy() for values in (logps.policy, logps.reference, logps.token_count))
    e, ratios = o.label_smoothing, p - r
    scores = DIVERGENCE[o.f_divergence](ratios, o.f_alpha)
    d = beta * (scores[:, 0] - scores[:, 1])
    w, l = beta * ratios[:, 0], beta * ratios[:, 1]  # noqa: E741
    mean = scores if logps.averaged else scores / n
    own = p if logps.averaged else p / n
    odds = np.sort(p[:, 0] - p[:, 1]) - np.sort(r[:, 0] - r[:, 1])
    unpaired = np.sort(ratios[:, 0]) - np.sort(ratios[:, 1])
    blend = sigma(d / o.discopop_tau)
    formulas: dict[str, Callable[[], np.ndarray]] = {
        "sigmoid": lambda: -(1 - e) * log_sigmoid(d) - e * log_sigmoid(-d),
        "robust": lambda: (-(1 - e) * log_sigmoid(d) + e * log_sigmoid(-d)) / (1 - 2 * e),
        "hinge": lambda: np.maximum(0, 1 - d),
        "ipo": lambda: (mean[:, 0] - mean[:, 1] - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: sigma(d) * (log_sigmoid(d) - np.log(1 - e)) + sigma(-d) * (log_sigmoid(-d) - np.log(e)),
        "nca_pair": lambda: -log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-l),
        "bco_pair": lambda: -log_sigmoid(w) - log_sigmoid(-l),
        "sppo_hard": lambda: (w / beta - 0.5 / beta) ** 2 + (l / beta + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - sigma(w) + sigma(l),
        "apo_down": lambda: sigma(w) + 1 - sigma(w - l),
        "discopop": lambda: -log_sigmoid(d) * (1 - blend) + np.exp(-d) * blend,
        "sigmoid_norm": lambda: -log_sigmoid(beta * (mean[:, 0] - mean[:, 1])),
        "simpo": lambda: -log_sigmoid(beta * (own[:, 0] - own[:, 1]) - o.simpo_gamma),
        "aot": lambda: -(1 - e) * log_sigmoid(beta * odds) - e * log_sigmoid(-beta * odds),
        "aot_unpaired": lambda: -(1 - e) * log_sigmoid(beta * unpaired) - e * log_sigmoid(-beta * unpaired),
    }
    return formulas[name]()


@pytest.mark.parametrize("averaged", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("divergence", DIVERGENCE)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_its_formula(name: str, divergence: str, averaged: bool) -> None:
    logps = random_logps(averaged)
    double = Logps(logps.policy.double(), logps.reference.double(), logps.token_count.double(), averaged)
    for smoothing, beta in ((0.1, 0.1), (0.3, 0.02)):
        options = LossOptions(label_smoothing=smoothing, f_divergence=divergence, f_alpha=0.7, simpo_gamma=0.4)
        expected = written_out(name, logps, beta, options)
        assert np.allclose(loss_named(name)(double, beta, options), expected, rtol=1e-9, atol=1e-9)
        # what float32 makes of values of this size; exp(-ratio) of a sum of a long answer may be huge
        assert np.allclose(loss_named(name)(logps, beta, options), expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("exo_pair", "simpo", "robust")])
def test_where_policy_and_reference_agree_every_reference_loss_is_a_constant(name: str) -> None:
    """At step 0 nothing of a pair is left in the loss; of sigmoid, ln 2."""
    logps = random_logps(averaged=True)
    losses = loss_named(name)(Logps(logps.policy, logps.policy.clone(), logps.token_count, True), 0.1, LossOptions())
    assert torch.allclose(losses, losses[0].expand_as(losses))
    assert name != "sigmoid" or losses[0].item() == pytest.approx(math.log(2))


def test_simpo_knows_no_reference() -> None:
    logps = random_logps(averaged=True)
    other = Logps(logps.policy, logps.reference * 0, logps.token_count, True)
    assert torch.equal(loss_named("simpo")(logps, 2.0, LossOptions()), loss_named("simpo")(other, 2.0, LossOptions()))


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_overflows(name: str) -> None:
    far = Logps(torch.tensor([[-700.0, 0.0], [0.0, -700.0]]), torch.zeros(2, 2), torch.full((2, 2), 700.0), False)
    assert torch.isfinite(loss_named(name)(far, 0.1, LossOptions(label_smoothing=0.1))).all()


def test_losses_mix_by_weight_and_take_an_sft_term() -> None:
    logps = random_logps(averaged=False)
    objective = Objective.parse("sigmoid:0.7, hinge:0.2", "sum", 0.1, LossOptions(sft_weight=0.5))
    chosen_tokens = logps.token_count[:, 0].mean().item()
    parts = [loss_named(name)(logps, 0.1, LossOptions()) for name in ("sigmoid", "hinge")]
    token_mean = -logps.policy[:, 0].sum() / logps.token_count[:, 0].sum()
    expected = (0.7 * parts[0] + 0.2 * parts[1]).mean() + 0.5 * token_mean
    assert objective(logps, chosen_tokens).mean().item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("sigmiod", "expected sigmoid"),
        ("", "expected sigmoid"),
        ("sigmoid:x", "must be a number"),
        ("sigmoid:-1", "above 0"),
        ("sigmoid:nan", "above 0"),
        ("sigmoid,sigmoid", "named twice"),
        ("exo_pair", "--label-smoothing above 0"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(loss: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Objective.parse(loss, "mean", 0.1, LossOptions())


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.5}, {"f_divergence": "kl"}, {"discopop_tau": 0}, {"sft_weight": -1}]
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--"):
        LossOptions(**options)


@pytest.mark.parametrize("averaged", [True, False], ids=["mean", "sum"])
def test_metrics_are_their_definitions(averaged: bool) -> None:
    logps = random_logps(averaged)
    losses = loss_named("sigmoid")(logps, 0.2, LossOptions())
    entropy = torch.rand(len(losses), 2)
    scores = PairScores(logps.policy, logps.token_count, torch.zeros(0), entropy)
    found = pair_metrics(losses, logps, 0.2, scores).numpy()
    values = dict(zip(NAMES, found, strict=False))
    assert len(found) == len(NAMES) + COUNTS
    p, r, n = (column.double().numpy() for column in (logps.policy, logps.reference, logps.token_count))
    assert np.allclose(values["rewards/margin"], 0.2 * ((p - r)[:, 0] - (p - r)[:, 1]), atol=1e-5)
    assert np.array_equal(values["rewards/accuracy"], (p - r)[:, 0] > (p - r)[:, 1])
    assert np.array_equal(values["accuracy/policy"], p[:, 0] > p[:, 1])
    assert np.array_equal(values["accuracy/reference"], r[:, 0] > r[:, 1])
    d = (p - r) if averaged else (p - r) / n
    assert np.allclose(values["kl"], (np.exp(-d) - 1 + d).mean(1), rtol=1e-3, atol=1e-5)
    assert (values["kl"] >= 0).all()
    assert np.array_equal(values["tokens/rejected"], n[:, 1])
    # sums over tokens, beside their number
    assert np.allclose(values["entropy"], (entropy.numpy() * n).sum(1), rtol=1e-6)
    assert np.array_equal(found[-2], n.sum(1)) and (found[-3] == 1).all() and (found[-1] == 0).all()


def test_means_are_over_pairs_and_over_tokens() -> None:
    """Of two batches, of which one has no entropy, and after a checkpoint in between."""
    logps, world = random_logps(True), one_process()
    token_kl = torch.rand(len(logps.policy), 2)
    known, losses = replace(logps, token_kl=token_kl), torch.rand(len(logps.policy))
    entropy = torch.rand(len(losses), 2)
    with_entropy = PairScores(logps.policy, logps.token_count, torch.zeros(0), entropy)
    means = Means(torch.device("cpu"))
    means.add(losses, known, 0.2, with_entropy)
    kept, means = means.sums.clone(), Means(torch.device("cpu"))
    means.load(kept)
    means.add(losses + 1, logps, 0.2, replace(with_entropy, entropy=None))
    found = means.reduce(world)
    counts = logps.token_count
    assert found["loss"] == pytest.approx(losses.mean().item() + 0.5, rel=1e-6)
    assert found["entropy"] == pytest.approx(((entropy * counts).sum() / counts.sum()).item(), rel=1e-6)
    assert found["kl_tokens"] == pytest.approx(token_kl.mean().item(), rel=1e-6)
    assert "kl_tokens" not in means.reduce(world)


@pytest.mark.parametrize("counts", [1, 2])
def test_sums_of_earlier_checkpoints_go_on_without_their_entropy(counts: int) -> None:
    """0.1.0 counted the pairs; then came the pairs that had an entropy, of which the mean was taken."""
    means, pairs = Means(torch.device("cpu")), 5.0
    earlier = torch.arange(14.0, dtype=torch.float64)
    means.load(torch.cat([earlier, torch.full((counts,), pairs, dtype=torch.float64)]))
    found = means.reduce(one_process())
    for name, total in zip(NAMES[:14], earlier.tolist(), strict=True):
        assert found[name] == pytest.approx(0.0 if name == "entropy" else total / pairs)
    assert "kl_tokens" not in found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_rises_then_follows_its_schedule(schedule: str) -> None:
    rates = [learning_rate(step, 100, 1e-3, schedule, 0.1, 0.2) for step in range(100)]
    assert rates[9] == pytest.approx(1e-3) and all(a < b for a, b in pairwise(rates[:10])) and rates[0] > 0
    t = (np.arange(90) + SCHEDULES[schedule].counts_from_1) / 90
    expected = {
        "cosine": 0.2 + 0.8 * (1 + np.cos(np.pi * t)) / 2,
        "linear": 1 - 0.8 * t,
        "constant": np.ones(90),
        "minimind-2504": 1 / 10 + (1 + np.cos(np.pi * t)) / 2,
        "minimind-2510": 1 / 10 + (1 + np.cos(np.pi * t)) / 2,
        "minimind-3": 0.1 + 0.45 * (1 + np.cos(np.pi * t)),
    }[schedule]
    assert np.allclose(rates[10:], 1e-3 * expected, rtol=1e-9)


def test_warmup_is_a_share_or_a_number_of_steps() -> None:
    # 0.26 of 20 is 5.2: the sixth step is below the peak too
    for warmup, rising in ((0.0, 0), (0.25, 5), (0.26, 6), (1, 1), (7, 7), (50, 20)):
        rates = [learning_rate(step, 20, 1.0, "constant", warmup, 0.0) for step in range(20)]
        assert [rate < 1.0 for rate in rates].count(True) == max(0, min(rising, 20) - 1)
    assert learning_rate(0, 1, 1e-3, "cosine", 0.0, 0.0) == pytest.approx(1e-3)


@pytest.mark.parametrize(("warmup", "steps", "rising"), [(0.07, 100, 7), (0.1, 15, 2), (0.29, 100, 29), (0.001, 10, 1)])
def test_a_share_of_warmup_is_rounded_up_and_not_by_the_last_bit_of_a_product(
    warmup: float, steps: int, rising: int
) -> None:
    assert warmup_steps(warmup, steps) == rising


def test_beta_changes_linearly_from_first_to_last_step() -> None:
    assert np.allclose([beta_at(step, 5, 0.1, 0.5) for step in range(5)], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert beta_at(3, 5, 0.1, None) == 0.1 and beta_at(0, 1, 0.1, 0.5) == 0.1


def test_norms_and_biases_do_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    groups = make_optimizer(model, "adamw", 1e-3, 0.1).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]
