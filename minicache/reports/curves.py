"""metrics.jsonl of a run -> its curves."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minicache.errors import DataError

Curve = tuple[list[int], list[float]]  # steps, values; as many of one as of the other
METRICS, FACTS, PICTURE = "metrics.jsonl", "run.json", "curves.png"


def names_apart(runs: list[Path]) -> list[str]:
    """The end of each path: as many parts of it as tell the runs apart."""
    parts = [run.resolve().parts for run in runs]
    most = max(map(len, parts))
    for count in range(1, most + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    raise AssertionError(runs)


def read_curves(run: Path) -> dict[str, Curve]:
    """Metric -> its steps, ascending, and values. Of a step logged twice (a resumed run) the later line counts.

    Raises:
        DataError: there is no run, no metrics.jsonl, or nothing in it; a line in its midst is broken.
    """
    found: dict[str, dict[int, float]] = {}
    for line in _lines(run):
        step = int(line["step"])
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(name, {})[step] = float(value)
    if not found:
        raise DataError(f"{run / METRICS}: no metrics yet; expected a line a logged step. Wait for the first one")
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in found.items()}


def _lines(run: Path) -> Iterator[dict[str, Any]]:
    file = run / METRICS
    if not file.is_file():
        raise DataError(_no_run(run))
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, line in lines:
        try:
            read = json.loads(line)
            int(read["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == lines[-1][0]:  # cut off by a kill
                return
            raise DataError(f"{file}, line {number}: expected a JSON object with 'step', got {line[:60]!r}") from error
        yield read


def _no_run(run: Path) -> str:
    if not run.is_dir():
        return f"{run}: no such run; expected a directory that `minidpo train --out` made"
    if inside := sorted(file.parent.name for file in run.glob(f"*/{METRICS}")):
        return f"{run}: holds runs and is none itself; name those to draw: {run / inside[0]} …, or {run}/*/"
    return f"{run}: no {METRICS} in it; expected a directory that `minidpo train --out` made"
