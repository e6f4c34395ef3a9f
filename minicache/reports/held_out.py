"""How a policy does on pairs that it was not trained on, with intervals, and what that means in words. No torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from minicache.reports.intervals import interval_of_mean, mcnemar, wilson
from minicache.reports.names import moved
from minicache.strict import read_as
from minicache.text import phrase

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Nats per token from the reference above which a policy has moved far, and below which hardly: by k3 of means, and over tokens.
FAR = {"kl": 0.3, "kl_tokens": 3.0}
HARDLY = {"kl": 1e-6, "kl_tokens": 1e-5}
# What a higher rate should reach: a hundred times that. The KL grows with the square of the rate, while it is small.
MOVED_BY = 100
# By how much the accuracy on training pairs is above the interval of that on held-out pairs where it is remarkable.
MEMORISED = 0.1
SURE = 0.05


@dataclass(frozen=True)
class HeldOut:
    """Figures over held-out pairs. Intervals are 95%.

    right: pairs whose implicit reward margin is above 0. accuracy_low, accuracy_high: of their share (Wilson).
    margin: mean reward margin; margin_low, margin_high: of it (bootstrap).
    policy_right, reference_right: pairs to whose chosen answer the model itself gives the higher logprob.
    gained, lost: of these, pairs that the policy alone gets right, and the reference alone. p_value: of the two (McNemar, exact).
    """

    pairs: int
    right: int
    accuracy_low: float
    accuracy_high: float
    margin: float
    margin_low: float
    margin_high: float
    policy_right: int
    reference_right: int
    gained: int
    lost: int
    p_value: float

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("pairs: expected 1 or more, got 0")

    @property
    def accuracy(self) -> float:
        """The share of pairs whose implicit reward margin is above 0."""
        return self.right / self.pairs


def held_out(margins: "NDArray[np.float64]", policy: "NDArray[np.bool_]", reference: "NDArray[np.bool_]") -> HeldOut:
    """The figures of n pairs.

    margins: (n,) implicit reward margins. policy, reference: (n,), whether the model's own logprob of chosen is the higher one.
    """
    right = int((margins > 0).sum())
    accuracy_low, accuracy_high = wilson(right, len(margins))
    margin_low, margin_high = interval_of_mean(margins)
    gained, lost = int((policy & ~reference).sum()), int((reference & ~policy).sum())
    return HeldOut(
        pairs=len(margins),
        right=right,
        accuracy_low=accuracy_low,
        accuracy_high=accuracy_high,
        margin=float(margins.mean()),
        margin_low=margin_low,
        margin_high=margin_high,
        policy_right=int(policy.sum()),
        reference_right=int(reference.sum()),
        gained=gained,
        lost=lost,
        p_value=mcnemar(gained, lost),
    )


def figures(found: HeldOut) -> list[tuple[str, str]]:
    """A name and a line for each of the figures."""
    values = {**asdict(found), "accuracy": found.accuracy}
    values["policy"], values["reference"] = found.policy_right / found.pairs, found.reference_right / found.pairs
    if not (found.right or found.margin_low or found.margin_high):
        return [("chosen is likelier", phrase("{reference:.1%} of {pairs:,} pairs, as by the reference", **values))]
    accuracy = "{accuracy:.1%} of {pairs:,} pairs (95%: {accuracy_low:.1%} to {accuracy_high:.1%})"
    change = "{policy:.1%}, the reference {reference:.1%}: {gained:,} pairs gained, {lost:,} lost, p = {p}"
    return [
        ("reward accuracy", phrase(accuracy, **values)),
        ("reward margin", phrase("{margin:+.4f} (95%: {margin_low:+.4f} to {margin_high:+.4f})", **values)),
        ("chosen is likelier", phrase(change, **values, p=_p(found.p_value))),
    ]


def _p(value: float) -> str:
    return format(value, ".2g") if value >= 1e-4 else phrase("below 0.0001")


def words_on_run(known: Mapping[str, Any]) -> list[str]:
    """What a finished run came to, in plain words, where there is something to say. known: run.json with an outcome."""
    outcome = known["outcome"]
    progress = outcome["progress"]
    best, last = progress.get("validation"), progress.get("last")
    # a line of the log is measured before its step's update
    if not last or (best is None and not progress.get("last_step")):
        return []
    if best is not None and outcome["model_step"] == 0:
        start = phrase("the model of --init-from") if known.get("init_from") else phrase("the reference")
        if _moves_hardly(last):
            advice = (
                "no step was better than the start and it hardly moved: the saved policy is {start}; try a higher --lr, more "
                "--epochs"
            )
        else:
            advice = (
                "no step was better than the start: the saved policy is {start}; try a lower --lr, a higher --beta, other "
                "pairs"
            )
        return [phrase(advice, start=start)]
    said = _on_distance(best or last, known.get("lr"))
    found, trained = _held_out_of(known), last.get("rewards/accuracy", 0.0)
    if found:
        said += _on_sureness(found)
        if trained > found.accuracy_high + MEMORISED:
            by_heart = (
                "reward accuracy in training, {trained:.0%}, is far above {held_out:.0%} on held-out pairs: it learned these "
                "pairs by heart; fewer --epochs, a lower --lr or more pairs"
            )
            said.append(phrase(by_heart, trained=trained, held_out=found.accuracy))
    return said


def learned(known: Mapping[str, Any]) -> bool:
    """Whether the policy of a finished run has left the model that it started from, as far as was measured. known: run.json."""
    outcome = known["outcome"]
    progress = outcome["progress"]
    # a line of the log is measured before its step's update
    measured = progress.get("validation") or (progress.get("last") if progress.get("last_step") else None)
    return outcome["model_step"] > 0 and not (measured and _moves_hardly(measured))


def figures_of_run(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """As `figures`, of the saved policy of a run; none of a run without validation, or of before. known: run.json."""
    found = _held_out_of(known)
    return figures(found) if found else []


def _held_out_of(known: Mapping[str, Any]) -> HeldOut | None:
    """The figures in run.json, of which a later version may hold more."""
    found = ((known.get("outcome") or {}).get("progress") or {}).get("held_out")
    read: HeldOut | None = read_as(HeldOut, found, "held_out", skip_unknown=True) if found else None
    return read


def words_on_policy(metrics: Mapping[str, float], found: HeldOut, is_reference: bool) -> list[str]:
    """What an evaluation came to, in plain words, where there is something to say. metrics: see training/metrics.py."""
    if is_reference:
        return [phrase("the policy has the reference's own weights: nothing was learned")]
    return [*_on_distance(metrics, None), *_on_sureness(found)]


def _moves_hardly(metrics: Mapping[str, float]) -> bool:
    name = moved(metrics)
    return metrics.get(name, HARDLY[name]) < HARDLY[name]


def _on_distance(metrics: Mapping[str, float], lr: float | None) -> list[str]:
    """On a policy that hardly moved, or moved far. lr: the rate that it was trained at."""
    name = moved(metrics)
    # what another version has not measured is nothing to speak of
    distance = metrics.get(name, HARDLY[name])
    if distance > FAR[name]:
        far = (
            "the policy has moved far, {distance:.1g} nats per token from the reference: read its answers (minidpo compare) "
            "before you use it; a lower --lr or a higher --beta keeps it closer"
        )
        return [phrase(far, distance=distance)]
    if not _moves_hardly(metrics):
        return []
    advice = phrase("try a higher --lr")
    if lr and distance > 0:
        better = lr * math.sqrt(MOVED_BY * HARDLY[name] / distance)
        advice = phrase("about --lr {better:.0e} would move it visibly", better=better) if better < 1e-3 else advice
    hardly = "the policy hardly moved, {distance:.1g} nats per token from the reference: {advice}"
    return [phrase(hardly, distance=distance, advice=advice)]


def _on_sureness(found: HeldOut) -> list[str]:
    """On pairs that are too few to tell, and on an accuracy that is below chance."""
    if found.accuracy_low <= 0.5 <= found.accuracy_high and found.p_value > SURE:
        few = (
            "{pairs:,} held-out pairs are too few to tell whether the policy got better: its accuracy may be "
            "{accuracy_low:.0%} or {accuracy_high:.0%}"
        )
        return [phrase(few, **asdict(found))]
    if found.accuracy_high < 0.5:
        worse = "the policy prefers the rejected answers: it got worse on held-out pairs; look at the data and at --lr"
        return [phrase(worse)]
    return []
