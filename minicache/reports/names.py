"""Names, units and formats of what is measured, as terminal, pages and pictures show it. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EVAL = "eval/"  # begins the name of a metric of held-out pairs
SHOWN_PROBLEMS = 20  # problems listed of a cache; `inspect-cache --json` lists all
LENGTHS = {
    "prefix": "shared beginning",
    "chosen": "chosen",
    "rejected": "rejected",
    "chosen_counted": "counted, chosen",
    "rejected_counted": "counted, rejected",
}
STATISTICS = {"min": ",.0f", "median": ",.1f", "mean": ",.1f", "p95": ",.0f", "max": ",.0f"}


@dataclass(frozen=True)
class Metric:
    """How a metric is shown. heading: of a narrow column."""

    heading: str
    name: str
    form: str


METRICS = {  # metric -> how it is shown
    "loss": Metric("loss", "loss", ".4f"),
    "accuracy/policy": Metric("likelier", "chosen is likelier", ".1%"),
    "rewards/accuracy": Metric("accuracy", "reward accuracy", ".1%"),
    "rewards/margin": Metric("margin", "reward margin", "+.4f"),
    "kl": Metric("kl", "moved from the reference (KL), nats per token", ".3g"),
}
SUMMARY = ("loss", "rewards/accuracy", "rewards/margin", "kl")  # the metrics that say how a training goes


@dataclass(frozen=True)
class Panel:
    """A chart of a run. metrics: the curves in it. level: a horizontal line to compare with."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    level: float | None = None

    def unit_of(self, runs: Sequence[Mapping[str, Any]]) -> str:
        """The unit, where the runs' logprobs are means or sums. runs: what their run.json say."""
        kinds = {str(facts.get("logps")) for facts in runs}
        units = {"mean": "nats per token", "sum": "nats per answer"}
        known = units.get(kinds.pop(), "nats") if len(kinds) == 1 else "nats: runs of mean and of sum"
        return self.unit.format(logps=known)

    def level_of(self, from_ln_2: bool) -> float | None:
        """from_ln_2: all the runs' losses begin at ln 2."""
        return math.log(2) if from_ln_2 and self.metrics == ("loss",) else self.level


PANELS = (
    Panel("loss", "", ("loss",)),
    Panel("reward margin", "", ("rewards/margin",), 0.0),
    Panel("reward accuracy", "share of pairs", ("rewards/accuracy",), 0.5),
    Panel("rewards", "", ("rewards/chosen", "rewards/rejected"), 0.0),
    Panel("policy's logprobs", "{logps}", ("logps/chosen", "logps/rejected")),
    Panel("moved from the reference (KL)", "nats per token", ("kl",)),
    Panel("learning rate", "", ("lr",)),
    Panel("gradient norm, before clipping", "", ("grad_norm",)),
)
