"""The names that options take, each one line in a dict: losses, divergences, schedules, optimizers, layouts.

An entry says where its code lies as "module:name", imported by `code_of` when it is first used, so that this file and the
command line need no torch. To add one, write the function and add the line; help, checks, docs and errors follow from it.
Formats of rows stand in data/formats.py and trackers in trackers/, in dicts of the same kind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol


class Entry(Protocol):
    """A line of one of these dicts."""

    @property
    def code(self) -> str: ...


@dataclass(frozen=True)
class LossEntry:
    """A preference loss. code: a function (Logps, beta, LossOptions) -> (B,) losses.

    reads: names of `LossOptions` that it looks at. from_ln_2: it is ln 2 where policy and reference agree.
    over_the_batch: it compares pairs with each other, so that a batch cannot be split.
    """

    code: str
    reads: tuple[str, ...] = ()
    from_ln_2: bool = False
    over_the_batch: bool = False


@dataclass(frozen=True)
class DivergenceEntry:
    """An f-divergence. code: a function (ratios, alpha) -> what takes their place. reads: as of a loss."""

    code: str
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScheduleEntry:
    """A schedule. code: a function (progress from 0 to 1, floor) -> share of the peak learning rate.

    reads: names of train's options that it looks at. counts_from_1: its first step after the warm-up has made progress already.
    """

    code: str
    reads: tuple[str, ...] = ()
    counts_from_1: bool = False


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer. code: a function (parameter groups, lr) -> torch's Optimizer.

    state_bytes: of its state, for each trained parameter. extra: the extra of the distribution that it needs, a package by the
    name in `package`. by_name: its state is tensors by the parameters' names, which shards can share out. gpu_only: it needs a GPU.
    """

    code: str
    state_bytes: float
    package: str | None = None
    extra: str | None = None
    by_name: bool = False
    gpu_only: bool = False


@dataclass(frozen=True)
class LayoutEntry:
    """A way to lay out pairs as rows of tokens. code: a `Layout`. about: for the help.

    branches: several sequences share a row, which a model must be able to tell apart.
    """

    code: str
    about: str
    branches: bool = True


_LOSS, _OPTIM, _SCHEDULE = "minicache.training.losses:", "minicache.training.optim:", "minicache.training.schedules:"
_DIVERGENCE = "minicache.training.divergences:"
_WITH_DIVERGENCE = ("f_divergence", "f_alpha")
_SMOOTHED = ("label_smoothing", *_WITH_DIVERGENCE)

LOSSES: dict[str, LossEntry] = {
    "sigmoid": LossEntry(f"{_LOSS}sigmoid", _SMOOTHED, from_ln_2=True),
    "robust": LossEntry(f"{_LOSS}robust", _SMOOTHED, from_ln_2=True),
    "hinge": LossEntry(f"{_LOSS}hinge", _WITH_DIVERGENCE),
    "ipo": LossEntry(f"{_LOSS}ipo", _WITH_DIVERGENCE),
    "exo_pair": LossEntry(f"{_LOSS}exo_pair", _SMOOTHED),
    "nca_pair": LossEntry(f"{_LOSS}nca_pair"),
    "bco_pair": LossEntry(f"{_LOSS}bco_pair"),
    "sppo_hard": LossEntry(f"{_LOSS}sppo_hard"),
    "apo_zero": LossEntry(f"{_LOSS}apo_zero"),
    "apo_down": LossEntry(f"{_LOSS}apo_down"),
    "discopop": LossEntry(f"{_LOSS}discopop", ("discopop_tau", *_WITH_DIVERGENCE)),
    "sigmoid_norm": LossEntry(f"{_LOSS}sigmoid_norm", _WITH_DIVERGENCE, from_ln_2=True),
    "simpo": LossEntry(f"{_LOSS}simpo", ("simpo_gamma",)),
    "aot": LossEntry(f"{_LOSS}aot", ("label_smoothing",), from_ln_2=True, over_the_batch=True),
    "aot_unpaired": LossEntry(f"{_LOSS}aot_unpaired", ("label_smoothing",), from_ln_2=True, over_the_batch=True),
}

DIVERGENCES: dict[str, DivergenceEntry] = {
    "reverse_kl": DivergenceEntry(f"{_DIVERGENCE}reverse_kl"),
    "forward_kl": DivergenceEntry(f"{_DIVERGENCE}forward_kl"),
    "js": DivergenceEntry(f"{_DIVERGENCE}jensen_shannon"),
    "alpha": DivergenceEntry(f"{_DIVERGENCE}alpha_divergence", ("f_alpha",)),
}

SCHEDULES: dict[str, ScheduleEntry] = {
    "cosine": ScheduleEntry(f"{_SCHEDULE}cosine", ("min_lr",)),
    "linear": ScheduleEntry(f"{_SCHEDULE}linear", ("min_lr",)),
    "constant": ScheduleEntry(f"{_SCHEDULE}constant"),
    "minimind-2504": ScheduleEntry(f"{_SCHEDULE}minimind_25"),
    "minimind-2510": ScheduleEntry(f"{_SCHEDULE}minimind_25", counts_from_1=True),
    "minimind-3": ScheduleEntry(f"{_SCHEDULE}minimind_3", counts_from_1=True),
}

OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(f"{_OPTIM}adamw", 8, by_name=True),
    "adamw-8bit": OptimizerEntry(f"{_OPTIM}adamw_8bit", 2, "bitsandbytes", "8bit"),
    "paged-adamw-8bit": OptimizerEntry(f"{_OPTIM}paged_adamw_8bit", 2, "bitsandbytes", "8bit", gpu_only=True),
}

# In the order in which `auto` tries them; the values of the others are compared with those of `padded`.
LAYOUTS: dict[str, LayoutEntry] = {
    "packed": LayoutEntry("minicache.scoring.batch:PACKED", "no padding"),
    "shared": LayoutEntry("minicache.scoring.batch:SHARED", "prefix once"),
    "padded": LayoutEntry("minicache.scoring.batch:PADDED", "two rows", branches=False),
}


def code_of(entry: Entry) -> Any:
    """The object that an entry names, imported now."""
    module, _, name = entry.code.partition(":")
    return getattr(import_module(module), name)


def names_of(entries: Mapping[str, Entry], *before: str) -> Callable[[], tuple[str, ...]]:
    """The names in a dict when they are asked for, behind those that stand before."""
    return lambda: (*before, *entries)
