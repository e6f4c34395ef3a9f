"""A tracking library can end a training only before its first step. An error that it raises later is noted once."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any

from minicache.errors import ConfigError, MinicacheError
from minicache.text import one_line
from minicache.trackers.base import Silent, Tracker
from minicache.trackers.libraries import TRACKERS, Library, RunName


class Guarded(Silent):
    """A library that may fail: at the start with a `ConfigError`, later with one note. What it prints goes to stderr."""

    def __init__(self, library: Library, note: Callable[[str], None]) -> None:
        self.library, self.note_to = library, note
        self.is_running = False

    def start(self, title: str, facts: dict[str, Any]) -> None:
        try:
            with redirect_stdout(sys.stderr):
                self.library.start(title, json.loads(json.dumps(facts, default=str)))
        except MinicacheError:
            raise
        except Exception as error:
            raise ConfigError(f"--tracker {self.library.name}: {one_line(error)}; {self.library.advice}") from error
        self.is_running = True

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._guard(lambda library: library.log(step, metrics))

    def fail(self, error: BaseException) -> None:
        self._guard(lambda library: library.fail(error))

    def close(self) -> None:
        self._guard(lambda library: library.close())
        self.is_running = False

    def _guard(self, call: Callable[[Library], None]) -> None:
        """Call a library that has started and has not failed yet."""
        if not self.is_running:
            return
        try:
            with redirect_stdout(sys.stderr):
                call(self.library)
        except Exception as error:
            self.is_running = False
            self.note_to(
                f"{self.library.name}: {one_line(error)}; it hears no more of this run, metrics.jsonl has all of it"
            )


def open_trackers(names: Sequence[str], run: RunName, note: Callable[[str], None]) -> list[Tracker]:
    """The trackers of these names. Nothing is imported or written before `start`, for which `run.directory` must exist.

    note: called with a line for a person when a library fails while the run goes on.

    Raises:
        ConfigError: a name is unknown or comes twice, or its library is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--tracker: expected one of {', '.join(TRACKERS)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--tracker: expected each name once, got {', '.join(names)}")
    for name in names:
        _require_installed(name, TRACKERS[name])
    return [Guarded(TRACKERS[name](name, run), note) for name in names]


def _require_installed(name: str, kind: type[Library]) -> None:
    spec = find_spec(kind.package)
    # no origin: a mere folder of that name, as wandb itself leaves behind
    if spec is None or spec.origin is None:
        wanted = f"'minidpo[{kind.extra}]'" if kind.extra else kind.package
        raise ConfigError(f"--tracker {name}: the library is not installed; pip install {wanted}")
