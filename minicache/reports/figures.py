"""The figures of a run in words and tables, for its page and its card. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicache.reports.curves import Curve
from minicache.reports.names import EVAL, METRICS
from minicache.text import Phrase, joined, phrase, read_back

# Reasons for an early end, as a run's Outcome has them.
NO_LOWER_LOSS = "no lower validation loss in {waited} validations"
MOVED_TOO_FAR = "the policy has moved {kl} nats per token from the reference, more than --max-kl {most}"


@dataclass(frozen=True)
class Figures:
    """A table. head: of its columns, the first for the names of the rows. rows: cells as text."""

    head: list[str]
    rows: list[list[str]]


def held_out_figures(known: Mapping[str, Any], logged: Mapping[str, Curve]) -> Figures | None:
    """The metrics over held-out pairs at the first validation, at that of the saved model and at the last; None without any.

    known: run.json. logged: metric -> steps and values.
    """
    if EVAL + "loss" not in logged:
        return None
    steps = logged[EVAL + "loss"][0]
    kept = (known.get("outcome") or {}).get("model_step")
    columns = [step for step in steps if step in (steps[0], kept, steps[-1])]
    notes = {
        0: "step {step:,} (before)",
        kept: "step {step:,} (before, and saved)" if kept == 0 else "step {step:,} (saved)",
    }
    names = [phrase(notes.get(step, "step {step:,}"), step=step) for step in columns]
    rows: list[list[str]] = []
    for name, metric in METRICS.items():
        if EVAL + name in logged:
            at = dict(zip(*logged[EVAL + name], strict=True))
            rows.append(
                [phrase(metric.name), *(f"{at[step]:{metric.form}}" if step in at else "–" for step in columns)]
            )
    return Figures(["metric", *names], rows)


def end_of(known: Mapping[str, Any], last: int) -> tuple[bool, Phrase]:
    """Whether a run is finished, and how it ended. known: run.json. last: the last step logged."""
    outcome = known.get("outcome")
    if not known:
        return False, phrase("run.json is missing: the run's options are not known.")
    if not outcome:
        text = "Not finished: last logged after step {step}. train --resume continues it."
        return False, phrase(text, step=_step_of(last, known))
    done, kept = outcome["progress"]["step"], outcome["model_step"]
    best = [phrase("The saved model is the best one, after step {kept:,}.", kept=kept)] if kept != done else []
    if outcome.get("stopped"):
        why = read_back(outcome["stopped"], (NO_LOWER_LOSS, MOVED_TOO_FAR))
        return False, joined(
            " ", [phrase("Stopped after step {step}: {why}.", step=_step_of(done, known), why=why), *best]
        )
    # a policy that is the model it started from is no success
    return kept > 0, joined(" ", [phrase("Finished after step {step}.", step=_step_of(done, known)), *best])


def _step_of(step: int, known: Mapping[str, Any]) -> Phrase:
    """A step, and of how many where that is known."""
    steps = known.get("steps")
    return phrase("{step:,}", step=step) if steps is None else phrase("{step:,} of {steps:,}", step=step, steps=steps)


def objective_of(known: Mapping[str, Any]) -> Phrase:
    """The objective of a run in a few words."""
    values = {"logps": "mean", "beta": None, "lr": None, **known}
    return phrase("{loss} loss on {logps} logprobs, beta {beta}, lr {lr}", **values)
