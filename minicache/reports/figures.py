"""The figures of a run in words and tables, for its page and its card. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicache.reports.curves import Curve
from minicache.reports.names import EVAL, METRICS


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
    notes = {0: " (before)", kept: " (before, and saved)" if kept == 0 else " (saved)"}
    names = [f"step {step:,}{notes.get(step, '')}" for step in columns]
    rows: list[list[str]] = []
    for name, metric in METRICS.items():
        if EVAL + name in logged:
            at = dict(zip(*logged[EVAL + name], strict=True))
            rows.append([metric.name, *(f"{at[step]:{metric.form}}" if step in at else "–" for step in columns)])
    return Figures(["metric", *names], rows)


def end_of(known: Mapping[str, Any], last: int) -> tuple[bool, str]:
    """Whether a run is finished, and how it ended. known: run.json. last: the last step logged."""
    steps = f" of {known['steps']:,}" if "steps" in known else ""
    outcome = known.get("outcome")
    if not known:
        return False, "run.json is missing: the run's options are not known."
    if not outcome:
        return False, f"Not finished: last logged after step {last:,}{steps}. train --resume continues it."
    done, kept = outcome["progress"]["step"], outcome["model_step"]
    best = f" The saved model is the best one, after step {kept:,}." if kept != done else ""
    if outcome.get("stopped"):
        return False, f"Stopped after step {done:,}{steps}: {outcome['stopped']}.{best}"
    # a policy that is the model it started from is no success
    return kept > 0, f"Finished after step {done:,}{steps}.{best}"


def objective_of(known: Mapping[str, Any]) -> str:
    """The objective of a run in a few words."""
    return (
        f"{known['loss']} loss on {known.get('logps', 'mean')} logprobs, beta {known.get('beta')}, lr {known.get('lr')}"
    )
