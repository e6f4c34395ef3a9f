"""The results of a sweep as plain data, which the screen, a picture and other programs read. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """The result of one run.

    options: values of the swept options. state: done, failed, unfinished (the same call resumes it) or not begun. problem: why it
    failed. held_out: metrics (see docs/training.md) of the saved model over the held-out pairs; None unless done. steps:
    optimizer steps done; model_step: those behind the saved model. pairs_trained: pairs in all steps. seconds: of training.
    """

    name: str
    options: dict[str, Any]
    state: str
    problem: str | None
    held_out: dict[str, float] | None
    steps: int
    model_step: int | None
    pairs_trained: int
    seconds: float


@dataclass(frozen=True)
class SweepReport:
    """Everything that `sweep` shows; the names are those of `--json` and sweep.json.

    runs: the best first, by accuracy on held-out pairs. swept: names of the swept options. reference_passes: pairs in all training
    steps, which a live reference would have scored. cached_pairs: pairs that stage one scored once. reference_pairs_per_second:
    rate of the same model without gradients, measured on this machine. seconds_not_spent, stage_one_seconds: reference_passes and
    cached_pairs divided by that rate.
    """

    out: Path
    swept: list[str]
    runs: list[RunResult]
    reference_passes: int
    cached_pairs: int
    reference_pairs_per_second: float
    seconds_not_spent: float
    stage_one_seconds: float
