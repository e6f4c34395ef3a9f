"""A tracking library can end a training only before its first step; what it raises later is told once."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any

from minicache.errors import ConfigError, MinicacheError
from minicache.trackers.base import Silent, Tracker
from minicache.trackers.libraries import TRACKERS, RunName, one_line

ADVICE = {  # to a library that does not start
    "wandb": "`wandb login` logs in, WANDB_MODE=offline needs no network",
    "swanlab": "`swanlab login` logs in, SWANLAB_MODE=offline needs no network",
    "tensorboard": "metrics.jsonl is written without it too",
    "trackio": "without TRACKIO_SPACE_ID and TRACKIO_SERVER_URL it needs no network",
}


class Guarded(Silent):
    """A library that may fail: at the start that is a `ConfigError`, later a note, once. What it prints goes to stderr."""

    def __init__(self, name: str, tracker: Tracker, note: Callable[[str], None]) -> None:
        self.name, self.note_to = name, note
        self.unstarted = tracker
        self.tracker: Tracker | None = None  # while it hears: from its start to its end or first failure

    def start(self, title: str, facts: dict[str, Any]) -> None:
        try:
            with redirect_stdout(sys.stderr):
                self.unstarted.start(title, json.loads(json.dumps(facts, default=str)))
        except MinicacheError:
            raise
        except Exception as error:
            raise ConfigError(f"--tracker {self.name}: {one_line(error)}; {ADVICE[self.name]}") from error
        self.tracker = self.unstarted

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._guard(lambda tracker: tracker.log(step, metrics))

    def fail(self, error: BaseException) -> None:
        self._guard(lambda tracker: tracker.fail(error))

    def close(self) -> None:
        self._guard(lambda tracker: tracker.close())
        self.tracker = None

    def _guard(self, call: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            with redirect_stdout(sys.stderr):
                call(self.tracker)
        except Exception as error:
            self.tracker = None
            self.note_to(f"{self.name}: {one_line(error)}; it hears no more of this run, metrics.jsonl has all of it")


def check_trackers(names: Sequence[str]) -> None:
    """Refuse names that are no tracker. Imports nothing.

    Raises:
        ConfigError: a name is unknown or comes twice.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--tracker: expected one of {', '.join(TRACKERS)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--tracker: expected each name once, got {', '.join(names)}")


def open_trackers(names: Sequence[str], run: RunName, note: Callable[[str], None]) -> list[Tracker]:
    """Trackers for the libraries named. Nothing is imported or written before `start`, for which `run.directory` must exist.

    note: where a line for a person goes, when a library fails while the run goes on.

    Raises:
        ConfigError: a name is unknown, or its library is not installed.
    """
    check_trackers(names)
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a mere folder of that name, as wandb itself leaves behind
            raise ConfigError(f"--tracker {name}: the library is not installed; pip install 'minidpo[{name}]'")
    return [Guarded(name, TRACKERS[name](run), note) for name in names]
