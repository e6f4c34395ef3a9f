"""Options of a sweep: which of train's may have several values, and the run that each combination makes. No torch."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from minicache.errors import ConfigError
from minicache.options.checks import split_share
from minicache.options.dictionaries import fill, option
from minicache.options.train import TrainConfig

# Those of train's options that may have several values, and of what kind: what changes how it learns, not where things lie.
SWEPT: dict[str, type] = {
    "loss": str,
    "logps": str,
    "beta": float,
    "label_smoothing": float,
    "sft_weight": float,
    "simpo_gamma": float,
    "lr": float,
    "schedule": str,
    "warmup": float,
    "weight_decay": float,
    "epochs": float,
    "batch_size": int,
    "lora_rank": int,
    "seed": int,
}


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
        raise ConfigError(f"sweep: expected values of at least one of {', '.join(map(option, SWEPT))}; got none")
    out, runs = Path(given["out"]), []
    named = [name for name, values in swept.items() if len(values) > 1] or list(swept)
    for values in product(*swept.values()):
        options = dict(zip(swept, values, strict=True))
        name = "_".join(f"{key.replace('_', '-')}-{_as_name(value)}" for key, value in options.items() if key in named)
        told = {key: options[key] for key in named}
        runs.append(SweepRun(name, told, fill(TrainConfig, {**defaults, **given, **options, "out": out / name})))
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise ConfigError(f"sweep: {twice[0]} would be made twice; expected each value once")
    return SweepConfig(out, tuple(runs), given.get("shard"))


def _values(name: str, texts: Sequence[str]) -> list[Any]:
    """`0.1,0.3` -> two values. A --loss with a colon in it is one, a mixture: its commas belong to it."""
    pieces = [
        piece.strip() for text in texts for piece in ([text] if name == "loss" and ":" in text else text.split(","))
    ]
    try:
        return [SWEPT[name](piece) for piece in pieces]
    except ValueError:
        wanted = {float: "numbers", int: "whole numbers"}[SWEPT[name]]
        raise ConfigError(f"{option(name)}: expected {wanted} separated by commas, got {','.join(texts)}") from None


def _as_name(value: Any) -> str:
    """A value as part of a directory's name."""
    text = format(value, "g") if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]", "-", text.replace(",", "+"))
