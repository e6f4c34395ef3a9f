"""Options of a sweep: which of train's may have several values, and the run that each combination makes. No torch."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from minicache.errors import ConfigError
from minicache.options.checks import split_share
from minicache.options.declare import Option, flag, options_of
from minicache.options.dictionaries import fill
from minicache.options.train import TrainConfig
from minicache.options.unused import require_read, why_unread

# Options of train that may have several values: those that change how a run learns, not where things lie. Their order is that
# of the values in a run's name.
_KINDS: dict[str, Any] = {item.name: item.type for item, _ in options_of(TrainConfig)}
SWEPT: dict[str, type] = {
    name: _KINDS[name]
    for name in (
        "loss",
        "logps",
        "beta",
        "label_smoothing",
        "sft_weight",
        "simpo_gamma",
        "lr",
        "schedule",
        "warmup",
        "weight_decay",
        "epochs",
        "batch_size",
        "lora_rank",
        "seed",
    )
}


SHARD = Option(help="Be job K of N that share one sweep, each doing its own runs.", metavar="K/N")


@dataclass(frozen=True)
class SweepRun:
    """One combination. options: those that have several values, by name. config: all; its `out` is the run's directory."""

    name: str
    options: dict[str, Any]
    config: TrainConfig


@dataclass(frozen=True)
class SweepConfig:
    """runs: all combinations, in order. shard: "K/N": do every N-th of them, from the K-th, as one of N independent jobs."""

    out: Path
    runs: tuple[SweepRun, ...]
    shard: str | None = None

    def __post_init__(self) -> None:
        split_share(self.shard)
        if not self.runs[0].config.validation.wanted:
            raise ConfigError(
                "sweep compares runs on pairs that none of them is trained on; expected --holdout 0.05 or --eval-cache, got neither"
            )

    @property
    def mine(self) -> list[SweepRun]:
        number, of = split_share(self.shard)
        return list(self.runs[number - 1 :: of])


def sweep_config(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SweepConfig:
    """A sweep from options by name. given: of those in SWEPT the list of texts a person wrote. defaults: a recipe's.

    Raises:
        ConfigError: a value that cannot be, a combination twice, or none of SWEPT is given.
    """
    swept = {name: _values(name, given[name]) for name in SWEPT if given.get(name)}
    if not swept:
        raise ConfigError(f"sweep: expected values of at least one of {', '.join(map(flag, SWEPT))}; got none")
    out, runs = Path(given["out"]), []
    named = [name for name, values in swept.items() if len(values) > 1] or list(swept)
    for values in product(*swept.values()):
        options = dict(zip(swept, values, strict=True))
        name = "_".join(f"{key.replace('_', '-')}-{_as_name(value)}" for key, value in options.items() if key in named)
        shown = {key: options[key] for key in named}
        runs.append(SweepRun(name, shown, fill(TrainConfig, {**defaults, **given, **options, "out": out / name})))
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise ConfigError(f"sweep: {twice[0]} would be made twice; expected each value once")
    _require_read(runs, given, {name for name, values in swept.items() if len(values) > 1})
    return SweepConfig(out, tuple(runs), given.get("shard"))


def _require_read(runs: Sequence[SweepRun], given: Mapping[str, Any], varied: Collection[str]) -> None:
    """Raises ConfigError: an option that no run reads, or one that varies and makes runs alike, because one does not read it."""
    for name in given:
        reasons = [why for run in runs if (why := why_unread(run.config, name))]
        if name in varied and reasons:
            raise ConfigError(f"{flag(name)}: {reasons[0]}; a sweep over it would make that run twice")
        if len(reasons) == len(runs):
            require_read(runs[0].config, [name])


def _values(name: str, texts: Sequence[str]) -> list[Any]:
    """`0.1,0.3` -> two values. A --loss with a colon in it is one, a mixture: its commas belong to it."""
    pieces = [
        piece.strip() for text in texts for piece in ([text] if name == "loss" and ":" in text else text.split(","))
    ]
    try:
        return [SWEPT[name](piece) for piece in pieces]
    except ValueError:
        wanted = {float: "numbers", int: "whole numbers"}[SWEPT[name]]
        raise ConfigError(f"{flag(name)}: expected {wanted} separated by commas, got {','.join(texts)}") from None


def _as_name(value: Any) -> str:
    """A value as part of a directory's name."""
    text = format(value, "g") if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]", "-", text.replace(",", "+"))
