"""Options of `sweep`: those of train that may have several values, and the run of each combination. No torch."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

from minicache.errors import ConfigError
from minicache.options.checks import split_share
from minicache.options.declare import Option, flag, options_of
from minicache.options.dictionaries import fill, flat
from minicache.options.train import TrainConfig
from minicache.options.unused import require_read, unread, why_unread

# Options of train that may have several values: those that change how a run learns. The values in a run's name have this order.
_KINDS: dict[str, Any] = {item.name: item.type for item, _ in options_of(TrainConfig)}
SWEPT: dict[str, type] = {
    # `float | None` takes numbers too
    name: next(iter(get_args(_KINDS[name])), _KINDS[name])
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


SHARD = Option(help="Run as job K of N that share one sweep; each does its own runs.", metavar="K/N")


@dataclass(frozen=True)
class SweepRun:
    """One combination. options: the values, by name, that differ between runs. config: all options; `out` is the run directory."""

    name: str
    options: dict[str, Any]
    config: TrainConfig


@dataclass(frozen=True)
class SweepConfig:
    """A sweep. runs: all combinations, in order. shard: "K/N" does every N-th run from the K-th on, as one of N jobs."""

    out: Path
    runs: tuple[SweepRun, ...]
    shard: str | None = None

    def __post_init__(self) -> None:
        split_share(self.shard)
        if not self.runs[0].config.validation.wanted:
            raise ConfigError(
                "sweep compares runs on pairs that none of them trains on; expected --holdout 0.05 or --eval-cache, got neither"
            )

    @property
    def mine(self) -> list[SweepRun]:
        """The runs of this job."""
        number, of = split_share(self.shard)
        return list(self.runs[number - 1 :: of])


def sweep_config(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SweepConfig:
    """The sweep with these options by name. given: for an option in SWEPT, the texts that the user wrote. defaults: of a recipe.

    Raises:
        ConfigError: a value is not allowed, a combination appears twice, or no option in SWEPT is given.
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
    # A sweep that 0.1.0 began with such options goes on.
    if not out.is_dir():
        _require_read(runs, given, {name for name, values in swept.items() if len(values) > 1})
    return SweepConfig(out, tuple(runs), given.get("shard"))


def sweep_values(config: SweepConfig, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a sweep's options by name, texts for those in SWEPT. given, defaults: as for `sweep_config`."""
    shared = {name: value for name, value in flat(config.runs[0].config).items() if name not in ("resume", *SWEPT)}
    of_recipe = {name: [str(value)] for name, value in defaults.items()}
    swept = {name: given.get(name) or of_recipe.get(name) for name in SWEPT}
    return {**shared, **swept, "out": str(config.out), "shard": config.shard}


def unread_by_all(runs: Sequence[SweepRun], names: Collection[str]) -> list[str]:
    """A line for each of these options of a recipe that none of the runs would read, with the first run's reason."""
    return unread(runs[0].config, [name for name in names if all(why_unread(run.config, name) for run in runs)])


def _require_read(runs: Sequence[SweepRun], given: Mapping[str, Any], varied: Collection[str]) -> None:
    """Check that the runs read the given options. varied: names of options with several values.

    Raises:
        ConfigError: no run reads an option, or a run does not read an option that varies, which would make equal runs.
    """
    for name in given:
        reasons = [why for run in runs if (why := why_unread(run.config, name))]
        if name in varied and reasons:
            raise ConfigError(f"{flag(name)}: {reasons[0]}; a sweep over it would make that run twice")
        if len(reasons) == len(runs):
            require_read(runs[0].config, [name])


def _values(name: str, texts: Sequence[str]) -> list[Any]:
    """The values in texts like `0.1,0.3`. A --loss with a colon is a single value, a mixture with commas.

    Raises:
        ConfigError: a value is not of the option's type.
    """
    pieces = [
        piece.strip() for text in texts for piece in ([text] if name == "loss" and ":" in text else text.split(","))
    ]
    try:
        return [SWEPT[name](piece) for piece in pieces]
    except ValueError:
        wanted = {float: "numbers", int: "whole numbers"}[SWEPT[name]]
        raise ConfigError(f"{flag(name)}: expected {wanted} separated by commas, got {','.join(texts)}") from None


def _as_name(value: Any) -> str:
    """The value as part of a directory's name."""
    text = format(value, "g") if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]", "-", text.replace(",", "+"))
