"""`Tracker`: what a stage reports while it runs. And the trackers that need no library."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from minicache.disk import MOST_JOURNAL, Journal, read_whole, written_whole
from minicache.json_lines import json_lines


class Tracker(Protocol):
    """Hears of a stage while it runs. Every method may do nothing."""

    def start(self, title: str, facts: dict[str, Any]) -> None:
        """The stage begins. facts: the settings that a person wants to see."""

    def begin(self, phase: str, pairs: int | None) -> None:
        """A phase begins and ends the one before it. pairs: how many it has, None if unknown."""

    def advance(self, pairs: int, tokens: int) -> None:
        """So many more pairs and tokens of the phase are done."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The numbers of an optimizer step."""

    def note(self, text: str) -> None:
        """One line that a person should read."""

    def fail(self, error: BaseException) -> None:
        """An error ends the stage; `close` follows."""

    def close(self) -> None: ...


class Silent:
    """Does nothing: the tracker of ranks other than 0, and the base of trackers that need only some of the methods."""

    def start(self, title: str, facts: dict[str, Any]) -> None: ...
    def begin(self, phase: str, pairs: int | None) -> None: ...
    def advance(self, pairs: int, tokens: int) -> None: ...
    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def note(self, text: str) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def close(self) -> None: ...

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.fail(error)
        self.close()


class JsonLines(Silent):
    """metrics.jsonl: one object for each logged step, written line by line. Raises OutputError: the disk is full or refuses.

    resumed_at: the next step of a run that goes on; the lines before it stay. None for a new run.
    """

    def __init__(self, file: Path, resumed_at: int | None = None) -> None:
        kept = points_before(resumed_at, file) if resumed_at is not None else []
        # a kill leaves the old file or the shortened one, never half of it
        with written_whole(file) as draft:
            draft.write_text("".join(_line(*point) for point in kept), encoding="utf-8", newline="\n")
        self.journal = Journal(file)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.journal.add(_line(step, metrics))

    def close(self) -> None:
        self.journal.close()


def _line(step: int, metrics: dict[str, float]) -> str:
    return json.dumps({"step": step, **metrics}) + "\n"


def points_before(step: int, file: Path) -> list[tuple[int, dict[str, float]]]:
    """The points of metrics.jsonl below `step`, none if there is no file. Lines that a kill or a power loss broke are left out."""
    points = []
    for line in json_lines(read_whole(file, MOST_JOURNAL)) if file.is_file() else []:
        at = line.value.pop("step", None) if isinstance(line.value, dict) else None
        if isinstance(at, int) and at < step:
            points.append((at, line.value))
    return points


class TrackerGroup(Silent):
    """Several trackers as one."""

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

    def fail(self, error: BaseException) -> None:
        for tracker in self.trackers:
            tracker.fail(error)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
