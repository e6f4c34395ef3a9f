"""Figures over held-out pairs and the words for them: each sentence where it applies, and none beside it."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from minicache.reports.held_out import (
    HeldOut,
    figures,
    figures_of_run,
    held_out,
    learned,
    words_on_policy,
    words_on_run,
)


def pairs_of(n: int, right: float, policy: float = 0.6, reference: float = 0.5) -> HeldOut:
    """Of n pairs, so many with a margin above 0, and with chosen likelier by policy and by reference."""
    at = (np.arange(n) + 0.5) / n
    margins = np.where(at < right, 1.0, -0.5)
    return held_out(margins, at < policy, at > 1 - reference)


GOOD = pairs_of(400, 0.7)
STAYED = replace(GOOD, gained=0, lost=0, p_value=1.0, right=0, margin=0.0, margin_low=0.0, margin_high=0.0)


def test_the_figures_are_plain_counts() -> None:
    random = np.random.default_rng(0)
    margins, policy, reference = random.normal(0.2, 1, 300), random.random(300) < 0.7, random.random(300) < 0.5
    found = held_out(margins, policy, reference)
    assert found.pairs == 300 and found.right == sum(margin > 0 for margin in margins)
    assert found.policy_right == sum(policy) and found.reference_right == sum(reference)
    assert found.gained == sum(a and not b for a, b in zip(policy, reference, strict=True))
    assert found.lost == sum(b and not a for a, b in zip(policy, reference, strict=True))
    assert found.policy_right - found.reference_right == found.gained - found.lost
    assert found.accuracy_low < found.accuracy < found.accuracy_high
    assert found.margin_low < found.margin < found.margin_high and found.margin == pytest.approx(margins.mean())
    assert 0 < found.p_value < 1


def test_lines_name_the_numbers() -> None:
    lines = dict(figures(GOOD))
    assert lines["reward accuracy"].startswith("70.0% of 400 pairs (95%: 65.")
    assert "pairs gained" in lines["chosen is likelier"] and "the reference 50.0%" in lines["chosen is likelier"]
    # a policy that is the reference is not told to prefer chosen in 0% of the pairs
    assert figures(STAYED) == [("chosen is likelier", "50.0% of 400 pairs, as by the reference")]


def test_what_no_run_writes_is_one_error_or_nothing() -> None:
    """run.json may be a stranger's, or a later version's."""
    known = run()
    known["outcome"]["progress"]["held_out"]["later"] = 1
    assert len(figures_of_run(known)) == 3 and words_on_run(known) == []
    with pytest.raises(ValueError, match="pairs: expected 1 or more"):
        replace(GOOD, pairs=0)
    progress = {"validation": {"loss": 1.0}, "last": {"loss": 1.0}}
    assert words_on_run({"outcome": {"model_step": 3, "progress": progress}}) == []


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, True),
        ({"model_step": 0}, False),
        ({"metrics": {"kl": 1e-9}}, False),
        ({"metrics": {"kl_tokens": 1e-9, "kl": 1.0}}, False),
    ],
)
def test_a_policy_that_is_its_start_or_hardly_left_it_has_learned_nothing(known: Any, expected: bool) -> None:
    assert learned(run(**known)) == expected


def test_a_run_of_one_step_was_measured_before_its_update() -> None:
    known = run(None, metrics={"kl": 0.0})
    assert "hardly moved" in words_on_run(known)[0]
    known["outcome"]["progress"]["last_step"] = 0
    assert words_on_run(known) == []


def run(found: HeldOut | None = GOOD, model_step: int = 20, **changes: Any) -> dict[str, Any]:
    """run.json of a finished run."""
    held = {"kl": 1e-3, "rewards/accuracy": found.accuracy if found else 0.0}
    last = {"kl": 1e-3, "rewards/accuracy": 0.72}
    for name, value in changes.pop("metrics", {}).items():
        held[name] = last[name] = value
    progress = {"validation": held if found else None, "last": last | changes.pop("last", {})}
    progress |= {"held_out": asdict(found) if found else None, "last_step": model_step}
    return {"lr": 1e-6, "outcome": {"model_step": model_step, "progress": progress}, **changes}


def test_a_good_run_has_nothing_to_be_told() -> None:
    assert words_on_run(run()) == []
    assert words_on_run(run(None)) == []
    assert words_on_policy({"kl": 1e-3}, GOOD, is_reference=False) == []


SAID: dict[str, tuple[dict[str, Any], str]] = {
    "the start is best": (
        run(STAYED, 0),
        "no step was better than the start: the saved policy is the reference; try a lower",
    ),
    "other weights are best": (run(STAYED, 0, init_from="sft"), "the saved policy is the model of --init-from"),
    "the start, hardly moved": (
        run(STAYED, 0, metrics={"kl": 1e-12}),
        "no step was better than the start and it hardly moved: the saved policy is the reference; try a higher --lr",
    ),
    # 1e-6 * sqrt(100 * 1e-6 / 1e-8)
    "hardly moved": (
        run(metrics={"kl": 1e-8}),
        "the policy hardly moved, 1e-08 nats per token from the reference: about --lr 1e-04",
    ),
    "not at all": (
        run(metrics={"kl": 0.0}),
        "the policy hardly moved, 0 nats per token from the reference: try a higher --lr",
    ),
    "far": (run(metrics={"kl": 0.4}), "the policy has moved far, 0.4 nats per token"),
    "too few": (run(pairs_of(20, 0.6)), "20 held-out pairs are too few to tell"),
    "worse": (run(pairs_of(400, 0.3), last={"rewards/accuracy": 0.3}), "the policy prefers the rejected answers"),
    "by heart": (
        run(last={"rewards/accuracy": 0.99}),
        "reward accuracy in training, 99%, is far above 70% on held-out pairs",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_each_sentence_where_it_applies(case: str) -> None:
    known, sentence = SAID[case]
    (found,) = words_on_run(known)
    assert found.startswith(sentence) or sentence in found


def test_distance_is_judged_by_tokens_where_they_are_known() -> None:
    (found,) = words_on_run(run(metrics={"kl": 1e-3, "kl_tokens": 4.0}))
    assert "moved far, 4" in found
    assert words_on_run(run(metrics={"kl": 0.4, "kl_tokens": 0.4})) == []


def test_a_policy_that_is_the_reference_is_told_so() -> None:
    assert words_on_policy({"kl": 0.0}, STAYED, is_reference=True) == [
        "the policy has the reference's own weights: nothing was learned"
    ]


def test_runs_of_earlier_versions_have_no_figures() -> None:
    known = run()
    del known["outcome"]["progress"]["held_out"]
    assert figures_of_run(known) == [] == figures_of_run({}) and words_on_run(known) == []
    assert len(figures_of_run(run())) == 3
