"""The curves of a run, read from its metrics.jsonl."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minicache.disk import MOST_JOURNAL, read_whole
from minicache.errors import DataError
from minicache.json_lines import json_lines

# Steps, and a value for each.
Curve = tuple[list[int], list[float]]
MOST_STEP = 2**53  # whole numbers that a float holds
MOST_DRAWN = 1e300  # matplotlib multiplies
METRICS, FACTS, PICTURE = "metrics.jsonl", "run.json", "curves.png"


def names_apart(runs: list[Path]) -> list[str]:
    """Short, different names of the runs: the fewest last parts of their paths that distinguish them."""
    parts = [run.resolve().parts for run in runs]
    most = max(map(len, parts))
    for count in range(1, most + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    raise AssertionError(runs)


def read_curves(run: Path) -> dict[str, Curve]:
    """The curve of each metric, its steps in ascending order. If a resumed run has logged a step twice, the later line counts.

    Raises:
        DataError: there is no run, no metrics.jsonl, or no line in it; or a line before the last is broken.
    """
    found: dict[str, dict[int, float]] = {}
    for line in _lines(run):
        step = int(line["step"])
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(name, {})[step] = _number(value)
    if not found:
        raise DataError(
            f"{run / METRICS}: no metrics yet; expected a line for each logged step. Wait for the first one"
        )
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in found.items()}


def _number(value: float) -> float:
    """As a float; infinite if no picture can be drawn of it, as of a whole number of hundreds of digits."""
    if abs(value) > MOST_DRAWN:
        return math.inf if value > 0 else -math.inf
    return float(value)


def _lines(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, without a last one that is broken. Raises DataError."""
    file = run / METRICS
    if not file.is_file():
        raise DataError(_no_run(run))
    try:
        lines = list(json_lines(read_whole(file, MOST_JOURNAL)))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    for line in lines:
        try:
            if not 0 <= int(line.value["step"]) < MOST_STEP:
                raise ValueError("a step that no run reaches")
        except (ValueError, TypeError, KeyError, OverflowError):
            # A kill may truncate the last line.
            if line is lines[-1]:
                return
            raise DataError(
                f"{file}, line {line.number}: expected a JSON object with 'step', got {line.text[:60]!r}"
            ) from line.error
        yield line.value


def _no_run(run: Path) -> str:
    """The message for a path that is not a run directory."""
    if not run.is_dir():
        return f"{run}: no such run; expected a directory that `minidpo train --out` made"
    if (run / FACTS).is_file():
        return f"{run / METRICS}: no metrics yet; the run has only begun: wait for its first line"
    if inside := sorted(file.parent.name for file in run.glob(f"*/{METRICS}")):
        return f"{run}: holds runs and is none itself; name those to draw: {run / inside[0]} …, or {run}/*/"
    return f"{run}: no {METRICS} in it; expected a directory that `minidpo train --out` made"
