"""Each call of the file system that a command makes fails in its turn: the disk is full, the medium fails, a rename, a flush.

A library that is preloaded makes them fail (faults.c), so that what Python, zarr, safetensors and torch write fails alike. Whatever
fails, the command ends well with its result, or says one line and does all of it when called again. FAULTS says how many calls are
tried of each command and kind, spread over all: a few, or a hundred in `make torture LONG=1`.
"""

import errno
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.torture.counting import Figures
from tests.torture.writers import Writer, judge, writers

__all__ = ["writers"]  # a fixture
FAULTS = int(os.environ.get("FAULTS", "4"))
TIMEOUT = 120.0
SOURCE = Path(__file__).with_name("faults.c")


@dataclass(frozen=True)
class Fault:
    """What fails. calls: of the file system; sticky: all that follow, too. harmless: no program may even notice it."""

    calls: str
    number: int
    sticky: bool = False
    harmless: bool = False


KINDS = {
    "the disk is full": Fault("write open mkdir truncate", errno.ENOSPC, sticky=True),
    "a write fails": Fault("write", errno.EIO),
    "a write is interrupted": Fault("write", errno.EINTR, harmless=True),
    "a write takes half": Fault("write", 0, sticky=True, harmless=True),
    "a rename fails": Fault("rename", errno.EIO),
    "a flush fails": Fault("sync", errno.EIO),
    "the file system turns read-only": Fault("write open mkdir rename truncate remove", errno.EROFS, sticky=True),
    "no file can be made": Fault("open mkdir", errno.EACCES, sticky=True),
}
NAMES = [
    "stage one",
    "train",
    "train, asynchronous saves",
    "train, LoRA",
    "sweep",
    "merge",
    "import-cache",
    "export of a policy",
]
NAMES += ["export of a cache", "report"]


class Forker:
    """Runs commands in which the library is preloaded; see forker.py."""

    def __init__(self, library: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.forker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "LD_PRELOAD": str(library)},
            start_new_session=True,
        )
        assert self._answer() == "ready"

    def _answer(self) -> str | None:
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
            return None
        return self.process.stdout.readline().decode().strip()

    def run(self, arguments: list[str], output: Path, environment: dict[str, str]) -> int | None:
        """The exit code; None if the command hangs."""
        assert self.process.stdin
        request = {"arguments": arguments, "output": str(output), "environment": environment}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        answer = self._answer()
        return None if answer is None else int(answer)


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    if not shutil.which("cc") or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    forker = Forker(library)
    yield forker
    with forker.process:
        forker.process.kill()


class Injector:
    """One command, one kind of fault: at the calls in their turn."""

    def __init__(self, what: str, forker: Forker, writer: Writer, fault: Fault, home: Path) -> None:
        self.figures = Figures(what)
        self.forker, self.writer, self.fault, self.home = forker, writer, fault, home
        # what the command says is written elsewhere: a screen is not what fails
        self.output = home.with_name("said")
        self.whole = home / "whole"
        self.calls = 0
        assert self._run(self.whole, 0) == 0, self.output.read_text()
        self.calls = self._count

    def _run(self, place: Path, at: int) -> int | None:
        """Run the command with the given call failing."""
        scratch, counter = self.home / "scratch", self.home / "counter"
        for folder in (place, scratch):
            folder.mkdir(parents=True, exist_ok=True)
        counter.write_bytes(bytes(8))
        environment = {
            "TMPDIR": str(scratch),
            "FAULT_UNDER": str(self.home),
            "FAULT_COUNTER": str(counter),
            "FAULT_CALLS": self.fault.calls,
            "FAULT_ERRNO": str(self.fault.number),
            "FAULT_AT": str(at),
            **({"FAULT_STICKY": "1"} if self.fault.sticky else {}),
        }
        (call,) = self.writer.at(place)
        code = self.forker.run(call, self.output, environment)
        self._count = int.from_bytes(counter.read_bytes(), "little")
        return code

    def trial(self, at: int) -> None:
        place, figures = self.home / "place", self.figures
        with figures.trial():
            code = self._run(place, at)
            figures.faults += self._count >= at
            said = self.output.read_text(errors="replace")
            lines = [line for line in said.splitlines() if line.startswith("error: ")]
            told = f"call {at} of {self.calls}: exit code {code}: {said}"
            figures.add("hangs", code is None, told)
            if code is None:
                return
            figures.add("tracebacks", "Traceback" in said, told)
            is_orderly = (code, len(lines)) in {(0, 0), (1, 1)} and not (code and self.fault.harmless)
            figures.add("wrong", not is_orderly and "Traceback" not in said, told)
            done = self.writer.kept(place)
            if code and (again := self._run(place, 0)):
                said = self.output.read_text(errors="replace")
                figures.add("hangs", again is None, f"called again: {said}\nbefore: {told}")
                figures.add("wrong", "exists already" not in said, f"called again: {said}\nbefore: {told}")
            self.writer.watch(figures, done, place)
            judge(figures, self.writer, self.whole, place, self.home / "scratch", told)
        shutil.rmtree(place)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_each_call_fails_in_its_turn(
    forker: Forker, writers: dict[str, Writer], tmp_path: Path, name: str, kind: str
) -> None:
    injector = Injector(f"{kind}: {name}", forker, writers[name], KINDS[kind], tmp_path / "home")
    assert injector.calls, "no such call was made: nothing is tested"
    for at in sorted({int(each) for each in np.linspace(1, injector.calls, FAULTS)}):
        injector.trial(at)
    assert injector.figures.faults
    injector.figures.end()
