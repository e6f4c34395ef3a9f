"""Where a run's progress and numbers go. The screen (screen.py) is one more tracker."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol


class Tracker(Protocol):
    """What a stage tells while it runs. Every method may do nothing."""

    def start(self, title: str, facts: dict[str, Any]) -> None:
        """The stage begins: what a person wants to know of its settings."""

    def begin(self, phase: str, pairs: int | None) -> None:
        """A phase of so many pairs begins (None: unknown); it ends where the next begins."""

    def advance(self, pairs: int, tokens: int) -> None:
        """Progress within the phase."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The numbers of an optimizer step."""

    def note(self, text: str) -> None:
        """One line that a person should read."""

    def close(self) -> None: ...


class Silent:
    """Tells nobody: what ranks other than 0 get, and the base of trackers that hear only some things."""

    def start(self, title: str, facts: dict[str, Any]) -> None: ...
    def begin(self, phase: str, pairs: int | None) -> None: ...
    def advance(self, pairs: int, tokens: int) -> None: ...
    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class JsonLines(Silent):
    """metrics.jsonl: one object a line, flushed line by line. keep: bytes of an interrupted run's file to go on after."""

    def __init__(self, file: Path, keep: int = 0) -> None:
        self.stream = file.open("ab")
        self.stream.truncate(keep)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.stream.write(json.dumps({"step": step, **metrics}).encode() + b"\n")
        self.stream.flush()

    def size(self) -> int:
        """Bytes so far."""
        return self.stream.tell()

    def close(self) -> None:
        self.stream.close()


class Both(Silent):
    """Tells several trackers the same."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = trackers

    def start(self, title: str, facts: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.start(title, facts)

    def begin(self, phase: str, pairs: int | None) -> None:
        for tracker in self.trackers:
            tracker.begin(phase, pairs)

    def advance(self, pairs: int, tokens: int) -> None:
        for tracker in self.trackers:
            tracker.advance(pairs, tokens)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def note(self, text: str) -> None:
        for tracker in self.trackers:
            tracker.note(text)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
