"""Options that are no field of a command's config: how the command runs, or how its result is shown."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minicache.options.declare import Option
from minicache.options.recipes import RECIPES


@dataclass(frozen=True)
class Extra:
    """An option that is no field of a command's config: how the command runs, or how its result is shown."""

    name: str
    kind: Any
    default: Any
    option: Option
    minimum: int | None = None


NPROC = Extra(
    name="nproc",
    kind=int,
    default=1,
    option=Option(help="Number of processes on this machine, started as torchrun would."),
    minimum=1,
)
DEVICE = Extra(
    name="device",
    kind=str,
    default="auto",
    option=Option(
        help="auto (the GPU that torch reports, else the CPU), cuda, mps, xpu, npu or cpu; cuda:1 by number."
    ),
)
JSON = Extra(name="json", kind=bool, default=False, option=Option(help="Print the result as JSON."))
VERBOSE = Extra(
    name="verbose",
    kind=bool,
    default=False,
    option=Option(help="Log each step to stderr, and show the traceback behind a one-line error."),
)
RECIPE = Extra(
    name="recipe",
    kind=str | None,
    default=None,
    option=Option(
        help=f"Use the options of a published recipe, in both stages: {', '.join(RECIPES)} (minidpo recipes shows them). "
        "Other options override them."
    ),
)
CONFIG = Extra(
    name="config",
    kind=Path | None,
    default=None,
    option=Option(
        help="Options from a file: .toml, .yaml, .json, or a run.json. Those on the command line override it.",
        metavar="FILE",
    ),
)
PRINT_CONFIG = Extra(
    name="print_config",
    kind=bool,
    default=False,
    option=Option(help="Print all options as a file for --config, and do nothing else."),
)


def in_panel(extra: Extra, panel: str) -> Extra:
    """The same extra in a panel of `--help`."""
    return replace(extra, option=replace(extra.option, panel=panel))
