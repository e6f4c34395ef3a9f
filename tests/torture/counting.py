"""The figures of a torture test, for the table of docs/reliability.md: a JSON line each in the file that TORTURE_TABLE names."""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

# Hours of work: `make torture LONG=1` adds to it, test by test.
FILE = Path(__file__).with_name("figures.jsonl")


def known(file: Path) -> dict[str, dict[str, Any]]:
    """The figures in a file by test: of one that was made again, the last."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {line["test"]: line for line in map(json.loads, lines)}


def machine() -> str:
    return (
        f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB, {platform.system()}, "
        f"Python {platform.python_version()}, torch {version('torch').split('+')[0]}, zarr {version('zarr')}"
    )


@dataclass
class Figures:
    """Of one test.

    trials: disturbed runs, each with its resumption; faults: what disturbed them, in all trials together. lost: trials in which
    finished work was gone; wrong: those that ended with another result than an undisturbed run; seconds: the longest trial.
    What no trial looked for is None, not 0. problems: each in words.
    """

    what: str
    trials: int = 0
    faults: int = 0
    lost: int | None = None
    wrong: int | None = None
    tracebacks: int | None = None
    hangs: int | None = None
    leftovers: int | None = None
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def add(self, kind: str, is_bad: bool, words: str) -> None:
        """Count what was looked for: 1 if it is bad, else 0."""
        setattr(self, kind, (getattr(self, kind) or 0) + is_bad)
        if is_bad:
            self.problems.append(f"{kind}, trial {self.trials}: {words}")

    @contextmanager
    def trial(self, faults: int = 0) -> Iterator[None]:
        """Count the block as a trial, and take its time."""
        begun = time.monotonic()
        self.trials, self.faults = self.trials + 1, self.faults + faults
        yield
        self.seconds = max(self.seconds, time.monotonic() - begun)

    def end(self) -> None:
        """Append them to the file named by TORTURE_TABLE, if that is set. Raises AssertionError: there were problems."""
        if table := os.environ.get("TORTURE_TABLE"):
            test = os.environ["PYTEST_CURRENT_TEST"].removesuffix(" (call)")
            found = {"test": test, **asdict(self), "seconds": round(self.seconds, 1)}
            found |= {"problems": len(self.problems), "date": str(date.today()), "machine": machine()}
            with Path(table).open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
        assert not self.problems, "\n".join(self.problems)


def asserted(what: str) -> Figures:
    """Of a test that ends with the first wrong result, traceback or leftover."""
    return Figures(what, wrong=0, tracebacks=0, leftovers=0)
