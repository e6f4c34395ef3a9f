"""The declaration of an option: once, as a field of a dataclass, with its default, help and bounds.

    lr: float = option(1e-6, "Peak learning rate.", above=0, panel="Optimizer")

The command line, its help, docs/commands.md and the checks are all derived from that declaration. No torch.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, TypedDict, Unpack

from minicache.errors import ConfigError

# The key of an `Option` in the metadata of a field.
KEY = "option"
MOST_WHOLE = 2**63  # whole numbers are below, as those of numpy and torch


@dataclass(frozen=True, kw_only=True)
class Option:
    """How an option appears on the command line, and which values it allows.

    help: one line, in which `{names}` is replaced by the names in `choices`.
    shown: its name on the command line, if it is not the field's name. aliases: other names. argument: it is positional.
    metavar: the placeholder of its value in the help. panel: its part of `--help`.
    least, most: inclusive bounds. above, below: exclusive bounds. what: the meaning of the number, such as "a share", for errors.
    choices: a function that returns the allowed names, called when they are needed, so that names added to a dict count.
    movable: a resumed run may have another value, because the option changes no number.
    """

    help: str
    shown: str | None = None
    aliases: tuple[str, ...] = ()
    argument: bool = False
    metavar: str | None = None
    panel: str | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    what: str | None = None
    choices: Callable[[], Iterable[str]] | None = None
    movable: bool = False

    @property
    def text(self) -> str:
        """The help, with the names of the choices filled in."""
        return self.help.replace("{names}", listed(self.choices(), "or")) if self.choices else self.help

    def check(self, name: str, value: Any) -> None:
        """Check each number or name in `value`, which may be a tuple or list; None is no value. name: for the error.

        Raises:
            ConfigError: a value is not allowed.
        """
        for each in value if isinstance(value, tuple | list) else (value,):
            if each is None or isinstance(each, bool):
                continue
            if self.choices and each not in (allowed := tuple(self.choices())):
                raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, got {each!r}")
            if isinstance(each, int | float) and not (self._is_within(each) and abs(each) < _limit(each)):
                raise ConfigError(f"{name}: expected {self._bounds()}, got {str(each)[:40]}")

    def _is_within(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def _bounds(self) -> str:
        if self.above is not None and self.most is None and self.below is None:
            return f"a number above {self.above:g}"
        low = f"above {self.above:g}" if self.above is not None else "" if self.least is None else f"{self.least}"
        if self.most is None and self.below is None:
            return f"{low} or more" if low else "a finite number"
        high = f"to {self.most}" if self.most is not None else f"to below {self.below:g}"
        return f"{self.what} from {low} {high}" if self.what else f"{low} {high}".strip()


class Rules(TypedDict, total=False):
    """The keyword arguments of `option`: fields of `Option`."""

    shown: str
    aliases: tuple[str, ...]
    argument: bool
    metavar: str
    panel: str
    least: float
    above: float
    most: float
    below: float
    what: str
    choices: Callable[[], Iterable[str]]
    movable: bool


def _limit(value: float) -> float:
    return MOST_WHOLE if isinstance(value, int) else math.inf


def option(default: Any, help: str, **rules: Unpack[Rules]) -> Any:
    """The field of a dataclass that declares an option."""
    return field(default=default, metadata={KEY: Option(help=help, **rules)})


def needed(help: str, **rules: Unpack[Rules]) -> Any:
    """The field of an option that has no default."""
    return option(MISSING, help, **rules)


def options_of(config: type) -> list[tuple[Field[Any], Option]]:
    """The options that a dataclass declares, in order, including those of the dataclasses in its fields."""
    found: list[tuple[Field[Any], Option]] = []
    for item in fields(config):
        if KEY in item.metadata:
            found.append((item, item.metadata[KEY]))
        elif isinstance(item.type, type) and is_dataclass(item.type):
            found += options_of(item.type)
    return found


def check_options(config: Any) -> None:
    """Check the options of a config, without those of the dataclasses in its fields, which check themselves.

    Raises:
        ConfigError: the value of an option is not allowed.
    """
    for item in fields(config):
        if KEY in item.metadata:
            declared = item.metadata[KEY]
            declared.check(declared.shown or flag(item.name), getattr(config, item.name))


def flag(name: str) -> str:
    """The option of a field on the command line: `--max-length` for `max_length`."""
    return f"--{name.replace('_', '-')}"


def listed(names: Iterable[str], last: str) -> str:
    """The names as a list in a sentence: `a, b or c`, where `last` is "or"."""
    *others, end = names
    return f"{', '.join(others)} {last} {end}" if others else end
