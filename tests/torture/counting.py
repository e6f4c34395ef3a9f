"""The figures of a torture test, for the table of docs/reliability.md: a JSON line each in the file that TORTURE_TABLE names."""

import json
import os
from pathlib import Path


def count(
    what: str,
    trials: int,
    faults: int,
    *,
    lost: int = 0,
    wrong: int = 0,
    tracebacks: int = 0,
    hangs: int = 0,
    leftovers: int = 0,
    seconds: float = 0.0,
) -> None:
    """Append the figures of one test to the file named by TORTURE_TABLE, if that is set.

    trials: disturbed runs, each with its resumption; faults: what disturbed them, in all trials together. lost: trials in which
    finished work was gone; wrong: those that ended with another result than an undisturbed run; seconds: the longest trial.
    """
    table = os.environ.get("TORTURE_TABLE")
    if not table:
        return
    figures: dict[str, object] = {"what": what, "trials": trials, "faults": faults, "lost": lost, "wrong": wrong}
    figures |= {"tracebacks": tracebacks, "hangs": hangs, "leftovers": leftovers, "seconds": round(seconds, 1)}
    with Path(table).open("a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")
