"""Names, units and formats of metrics and statistics for terminal, pages and pictures. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Beginning of the names of metrics over held-out pairs.
EVAL = "eval/"
# Problems of a cache that are listed; `inspect-cache --json` lists all of them.
SHOWN_PROBLEMS = 20
LENGTHS = {
    "prefix": "shared beginning",
    "chosen": "chosen",
    "rejected": "rejected",
    "chosen_counted": "counted, chosen",
    "rejected_counted": "counted, rejected",
}
STATISTICS = {"min": ",.0f", "median": ",.1f", "mean": ",.1f", "p95": ",.0f", "max": ",.0f"}
# Fields of a cache's identity that name what its chat template was given -> their names; few caches have them.
TEMPLATE_VALUES = {"date": "date", "template_args": "template args"}


def template_values(identity: Mapping[str, Any]) -> dict[str, str]:
    """The date and the arguments that the chat template of a cache was given, those that the identity has, by name."""
    return {name: identity[field] for field, name in TEMPLATE_VALUES.items() if identity.get(field)}


def model_name(source: str) -> str:
    """The end of a model's place that names it: `Qwen3-0.6B` of `org/Qwen3-0.6B`, `sft/model` of `runs/sft/model`."""
    parts = [part for part in source.replace("\\", "/").split("/") if part]
    return "/".join(parts[-2:] if parts[-1:] == ["model"] else parts[-1:])


@dataclass(frozen=True)
class Metric:
    """The display of a metric. heading: of a narrow column. form: format of its values."""

    heading: str
    name: str
    form: str


METRICS = {
    "loss": Metric("loss", "loss", ".4f"),
    "accuracy/policy": Metric("likelier", "chosen is likelier", ".1%"),
    "rewards/accuracy": Metric("accuracy", "reward accuracy", ".1%"),
    "rewards/margin": Metric("margin", "reward margin", "+.4f"),
    "kl": Metric("kl", "moved from the reference (k3 of means, at most k3 over tokens), nats per token", ".3g"),
    "kl_tokens": Metric("kl", "moved from the reference (k3 over tokens), nats per token", ".3g"),
}
# The metrics that summarise a training.
SUMMARY = ("loss", "rewards/accuracy", "rewards/margin", "kl", "kl_tokens")


def moved(metrics: Mapping[str, Any]) -> str:
    """The metric that says how far a policy has moved: over tokens where each token's reference logprob is known."""
    return "kl_tokens" if "kl_tokens" in metrics else "kl"


@dataclass(frozen=True)
class Panel:
    """A chart of a run. metrics: its curves. level: a horizontal line for comparison, or None."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    level: float | None = None

    def unit_of(self, runs: Sequence[Mapping[str, Any]]) -> str:
        """The unit, which may depend on whether logprobs are means or sums. runs: the entries of their run.json."""
        kinds = {str(facts.get("logps")) for facts in runs}
        units = {"mean": "nats per token", "sum": "nats per answer"}
        known = units.get(kinds.pop(), "nats") if len(kinds) == 1 else "nats: runs of mean and of sum"
        return self.unit.format(logps=known)

    def level_of(self, from_ln_2: bool) -> float | None:
        """The level, which is ln 2 for losses that begin there. from_ln_2: whether the losses of all runs do."""
        return math.log(2) if from_ln_2 and self.metrics == ("loss",) else self.level


PANELS = (
    Panel("loss", "", ("loss",)),
    Panel("reward margin", "", ("rewards/margin",), 0.0),
    Panel("reward accuracy", "share of pairs", ("rewards/accuracy",), 0.5),
    Panel("rewards", "", ("rewards/chosen", "rewards/rejected"), 0.0),
    Panel("policy's logprobs", "{logps}", ("logps/chosen", "logps/rejected")),
    Panel("moved from the reference (KL over tokens)", "nats per token", ("kl_tokens",)),
    Panel("moved from the reference (KL of means)", "nats per token", ("kl",)),
    Panel("learning rate", "", ("lr",)),
    Panel("gradient norm, before clipping", "", ("grad_norm",)),
)
