"""What a sweep found, as plain data: the screen, a picture and other programs read it. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """One run. options: the swept ones. state: done, failed, unfinished (it goes on) or not begun. problem: why it failed.

    held_out: metrics (see docs/training.md) of the saved model over the held-out pairs; None unless done. steps: optimizer
    steps done; model_step: those behind the saved model. pairs_trained: pairs in all steps. seconds: of training.
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
    """Everything `sweep` shows; `--json` and sweep.json have just this, by these names.

    runs: the best first, by accuracy on held-out pairs. swept: names of the options that have values in each run.
    reference_passes: pairs in all training steps, each of which a live reference would have run over. cached_pairs: those that
    stage one ran it over once. reference_pairs_per_second: measured on this machine, of the same model without gradients.
    seconds_not_spent, stage_one_seconds: the two numbers of pairs by that rate.
    """

    out: Path
    swept: list[str]
    runs: list[RunResult]
    reference_passes: int
    cached_pairs: int
    reference_pairs_per_second: float
    seconds_not_spent: float
    stage_one_seconds: float
