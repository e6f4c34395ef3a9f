"""How far a run is, and how it ended. No torch."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Progress:
    """How far a run is.

    step: optimizer steps done. seconds, tokens, flops: since the last log line; total_seconds, total_tokens: of the run.
    validated, saved: the steps of the last validation and of the last checkpoint; -1: none yet. best, best_step, validation: loss,
    step and metrics of the best one. waited: validations since the last whose loss was lower than `anchor` by --min-gain. pending:
    validated metrics for the next line.
    first, last: logged lines; last_step: which the last is of. warned: of --max-kl.
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
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    last_step: int = 0

    @property
    def model_step(self) -> int:
        """Optimizer steps behind the model to save: the best validated one, or the last."""
        return self.step if self.best_step is None else self.best_step


@dataclass(frozen=True)
class Outcome:
    """How a run ended. model_step: optimizer steps behind the saved model. stopped: why before its time, if so."""

    model_step: int
    stopped: str | None
    progress: Progress
