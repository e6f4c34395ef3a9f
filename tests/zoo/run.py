"""Checks many families, each in a process of its own with a limit of time and memory, two at a time.

The processes are forks of one that has imported everything, which saves five seconds for each.
"""

import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.zoo.families import Family, families, nature

SECONDS, BYTES, AT_ONCE = 180, 10 * 2**30, 2


@dataclass(frozen=True)
class Child:
    """A process at work on a family. result: the file that it writes."""

    family: Family
    result: Path
    started: float


def chosen(only: str) -> list[Family]:
    """The families of these names or model types, all if there are none. Raises SystemExit: there is none of a name."""
    everyone, names = families(), [name.strip() for name in only.split(";" if ";" in only else ",") if name.strip()]
    strange = set(names) - {family.name for family in everyone} - {family.kind for family in everyone}
    if strange:
        raise SystemExit(f"--only: transformers has no {', '.join(sorted(strange))}")
    return [family for family in everyone if not names or {family.name, family.kind} & set(names)]


def check_all(chosen: list[Family], out: Path) -> Iterator[dict[str, Any]]:
    """What check.py finds about each family, as each is done. out: a folder for logs and results."""
    from tests.conftest import save_tokenizer
    from tests.zoo.pairs import write_pairs

    _import_everything()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="zoo-") as scratch:
        place = Path(scratch)
        (place / "tokenizer").mkdir()
        inputs = save_tokenizer(place / "tokenizer"), write_pairs(place / "pairs.jsonl")
        waiting, running = list(reversed(chosen)), dict[int, Child]()
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                family = waiting.pop()
                pid = _fork(family, inputs, place / re.sub(r"\W+", "-", family.name), out)
                running[pid] = Child(family, place / f"{pid}.json", time.monotonic())
            yield from _collect(running)
            time.sleep(0.02)


def _import_everything() -> None:
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import tests.zoo.check  # noqa: F401


def _fork(family: Family, inputs: tuple[Path, Path], place: Path, out: Path) -> int:
    """Start a process that checks the family; returns its id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open(out / "logs" / f"{place.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        place.mkdir()
        _check_here(family, inputs, place)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _check_here(family: Family, inputs: tuple[Path, Path], place: Path) -> None:
    from tests.zoo.check import check

    warnings.simplefilter("ignore")
    found = check(family, *inputs, place)
    (place.parent / f"{os.getpid()}.json").write_text(json.dumps(found))


def _collect(running: dict[int, Child]) -> Iterator[dict[str, Any]]:
    """The results of the processes that have ended; those beyond their time are ended."""
    for pid, child in list(running.items()):
        seconds = time.monotonic() - child.started
        if seconds > SECONDS:
            os.kill(pid, signal.SIGKILL)
        ended, status = os.waitpid(pid, 0 if seconds > SECONDS else os.WNOHANG)
        if not ended:
            continue
        del running[pid]
        found: dict[str, Any] = {"name": child.family.name, "kind": child.family.kind, "nature": nature(child.family)}
        if child.result.exists():
            found = json.loads(child.result.read_text())
        else:
            why = f"takes longer than {SECONDS} s" if seconds > SECONDS else f"its process ended with {status}"
            found["build"] = {"failed": why, "raw": True}
        yield {**found, "seconds": round(seconds, 1)}
