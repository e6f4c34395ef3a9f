"""The names that options accept, one line each in a dict: losses, divergences, schedules, optimizers, layouts.

An entry names its code as "module:name", which `code_of` imports at first use, so that this file and the command line need no
torch. To add an entry, write the function and add the line; help, checks, docs and errors follow from it. Row formats are in
data/formats.py and trackers in trackers/, in dicts of the same kind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Protocol


class Entry(Protocol):
    """An entry of one of these dicts."""

    @property
    def code(self) -> str: ...


@dataclass(frozen=True)
class LossEntry:
    """A preference loss. code: a function (Logps, beta, LossOptions) -> (B,) losses.

    reads: names of the `LossOptions` that it reads. from_ln_2: it equals ln 2 where policy and reference agree.
    over_the_batch: it compares pairs with each other, so that a batch cannot be split.
    """

    code: str
    reads: tuple[str, ...] = ()
    from_ln_2: bool = False
    over_the_batch: bool = False


@dataclass(frozen=True)
class DivergenceEntry:
    """An f-divergence. code: a function (log ratios, alpha) -> the values that replace them. reads: as in `LossEntry`."""

    code: str
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScheduleEntry:
    """A learning-rate schedule. code: a function (progress from 0 to 1, floor) -> share of the peak learning rate.

    reads: names of train's options that it reads. counts_from_1: progress is above 0 at the first step after the warm-up.
    """

    code: str
    reads: tuple[str, ...] = ()
    counts_from_1: bool = False


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer. code: a function (parameter groups, lr) -> torch's Optimizer.

    state_bytes: bytes of its state per trained parameter. package, extra: the package that it needs, and the extra of this
    distribution that installs it. by_name: its state is tensors by parameter name, which can be sharded. gpu_only: it needs a GPU.
    alone: it works in one process only.
    """

    code: str
    state_bytes: float
    package: str | None = None
    extra: str | None = None
    by_name: bool = False
    gpu_only: bool = False
    alone: bool = False


@dataclass(frozen=True)
class LayoutEntry:
    """A way to lay out pairs as rows of tokens. code: a `Layout`. about: a few words for the help.

    branches: chosen and rejected go on from one prefix, which a model that carries a state from token to token cannot do.
    """

    code: str
    about: str
    branches: bool = False


_LOSS, _OPTIM, _SCHEDULE = "minicache.training.losses:", "minicache.training.optim:", "minicache.training.schedules:"
_LAYOUT = "minicache.scoring.layouts:"
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
    "adamw": OptimizerEntry(code=f"{_OPTIM}adamw", state_bytes=8, by_name=True),
    "adamw-8bit": OptimizerEntry(code=f"{_OPTIM}adamw_8bit", state_bytes=2, package="bitsandbytes", extra="8bit"),
    "paged-adamw-8bit": OptimizerEntry(
        code=f"{_OPTIM}paged_adamw_8bit", state_bytes=2, package="bitsandbytes", extra="8bit", gpu_only=True
    ),
    # none of it on the GPU
    "adamw-cpu": OptimizerEntry(
        code=f"{_OPTIM}adamw_on_cpu", state_bytes=0, package="torchao", extra="torchao", gpu_only=True, alone=True
    ),
}

# With --weights bfloat16: each rounds what it adds to a weight stochastically, and holds its state in 8 bits.
ROUNDING: dict[str, OptimizerEntry] = {
    # scales of blocks of 256 numbers
    "adamw": OptimizerEntry(
        code=f"{_OPTIM}rounding_adamw", state_bytes=2 + 2 * 4 / 256, package="torchao", extra="torchao"
    ),
    "adamw-cpu": replace(OPTIMIZERS["adamw-cpu"], code=f"{_OPTIM}rounding_adamw_on_cpu"),
}

# Precision of the weights that are trained -> the optimizers that update them.
WEIGHTS: dict[str, dict[str, OptimizerEntry]] = {"float32": OPTIMIZERS, "bfloat16": ROUNDING}

# In the order in which `auto` tries them. Their logprobs are compared with those of `padded`.
LAYOUTS: dict[str, LayoutEntry] = {
    "packed": LayoutEntry(f"{_LAYOUT}PACKED", "no padding", branches=True),
    "shared": LayoutEntry(f"{_LAYOUT}SHARED", "prefix once", branches=True),
    "sequences": LayoutEntry(f"{_LAYOUT}SEQUENCES", "both sides whole, no padding"),
    "padded": LayoutEntry(f"{_LAYOUT}PADDED", "two rows"),
}


def code_of(entry: Entry) -> Any:
    """The object that an entry names, imported at this call."""
    module, _, name = entry.code.partition(":")
    return getattr(import_module(module), name)


def names_of(entries: Mapping[str, object], *before: str) -> Callable[[], tuple[str, ...]]:
    """A function that returns `before` and the names that are in the dict when it is called."""
    return lambda: (*before, *entries)
