"""The progress of a run and its outcome. No torch."""

from dataclasses import dataclass, field
from typing import Literal

from minicache.reports.held_out import HeldOut


@dataclass
class Progress:
    """The progress of a run, as a checkpoint holds it.

    step: optimizer steps done. seconds, tokens, flops: since the last log line; total_seconds, total_tokens: of the run.
    validated, saved: the steps of the last validation and of the last checkpoint; -1: none yet. best, best_step, validation:
    loss, step and metrics of the best validation; held_out: its figures with intervals. anchor: the loss to improve on by
    --min-gain; waited: validations since the last that did. pending: validation metrics for the next log line. first, last:
    metrics of the first and the last log line; last_step: the step of the last. warned: whether the warning of --max-kl was
    given; stopped: why it ends the run.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    total_seconds: float = 0.0
    total_tokens: int = 0
    validated: int | Literal[-1] = -1
    saved: int | Literal[-1] = -1
    best: float | None = None
    best_step: int | None = None
    validation: dict[str, float] | None = None
    waited: int = 0
    anchor: float | None = None
    pending: dict[str, float] = field(default_factory=dict)
    warned: bool = False
    stopped: str | None = None
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    last_step: int = 0
    held_out: HeldOut | None = None

    @property
    def model_step(self) -> int:
        """Optimizer steps behind the model to save: the best validated one, or the last."""
        return self.step if self.best_step is None else self.best_step


@dataclass(frozen=True)
class Outcome:
    """The end of a run. model_step: optimizer steps behind the saved model. stopped: the reason for an early end, or None."""

    model_step: int
    stopped: str | None
    progress: Progress
