"""SIGKILL at any moment, again and again, of every command that writes, until it has finished all the same.

KILLS says how many in all of each command: a few, or a hundred in `make torture LONG=1`. A trial kills the call a few times, then
lets it come to its end; the result is compared with that of a call that nothing disturbed, and nothing else may be left.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.hub_repos import Hub
from tests.helpers.stores import assert_same_store
from tests.stages.test_crash import FORKS, Job, job, kill_all, run_here
from tests.stages.test_push import train_into
from tests.torture.counting import Figures
from tests.torture.writers import Writer, judge, writers

__all__ = ["job", "writers"]  # fixtures
KILLS = int(os.environ.get("KILLS", "4"))
MOST_KILLS = 5  # of a trial
TIMEOUT = 300.0  # seconds until a call that nobody kills is taken to hang
FORKS.set_forkserver_preload(
    [
        "minicache.cli",
        "minicache.stages.precompute",
        "minicache.stages.train",
        "minicache.stages.sweep",
        "minicache.stages.merge",
        "minicache.stages.import_cache",
        "minicache.stages.export",
        "minicache.stages.export_cache",
        "minicache.stages.report",
        "transformers.models.llama.modeling_llama",
        "bitsandbytes",
        "peft",
        "tests.stages.test_crash",
    ]
)

NAMES = [
    "stage one", "stage one, two shards at once", "stage one, two processes", "train", "train, asynchronous saves",
    "train, held-out pairs", "train, LoRA", "train, 8-bit optimizer", "train, 8-bit base", "train, 4-bit base",
    "train, two processes", "sweep", "merge", "import-cache", "export of a policy", "export of a cache", "report",
]  # fmt: skip


class Call:
    """A command at work in processes of its own, that all end by one signal. output: what it says."""

    def __init__(self, arguments: list[str], output: Path, scratch: Path) -> None:
        self.output = output
        self._forked: ForkServerProcess | None = None
        self._started: subprocess.Popen[bytes] | None = None
        if "--nproc" in arguments:
            # a launcher of others, which fork badly from a process that has threads
            with output.open("wb") as said:
                self._started = subprocess.Popen(
                    [sys.executable, "-m", "minicache", *arguments],
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, "TMPDIR": str(scratch)},
                )
        else:
            self._forked = FORKS.Process(target=run_with, args=(arguments, output, scratch))
            self._forked.start()

    @property
    def group(self) -> int | None:
        return (self._started or self._forked).pid  # type: ignore[union-attr]

    @property
    def code(self) -> int | None:
        return self._started.returncode if self._started else self._forked.exitcode  # type: ignore[union-attr]

    def ends_within(self, seconds: float) -> bool:
        if self._started:
            with suppress(subprocess.TimeoutExpired):
                self._started.wait(seconds)
            return self._started.poll() is not None
        assert self._forked
        self._forked.join(seconds)
        return not self._forked.is_alive()

    def kill(self) -> None:
        kill_all(self.group)
        self.ends_within(TIMEOUT)


def run_with(arguments: list[str], output: Path, scratch: Path) -> None:
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    run_here(arguments, output)


class Killer:
    """Kills a writer until it is done, again and again in fresh places."""

    def __init__(self, name: str, writer: Writer, home: Path) -> None:
        self.figures = Figures(f"killed: {name}")
        self.writer, self.home, self.chance = writer, home, random.Random(name)
        self.scratch = home / "scratch"
        self.whole = home / "whole"
        # twice: the first one also waits for what the fork server has not imported yet
        for place in (home / "first", self.whole):
            begun = time.monotonic()
            assert self._run(place, None) and not self.figures.problems, self.figures.problems
            self.usual = time.monotonic() - begun

    def trial(self) -> None:
        place, done = self.home / f"{self.figures.trials}", self.writer.kept(self.home / "none")
        kills = [self.chance.random() * self.usual for _ in range(self.chance.randint(1, MOST_KILLS))]
        with self.figures.trial():
            for seconds in (*kills, None):
                ended = self._run(place, seconds)
                done = self.writer.watch(self.figures, done, place)
                if ended:
                    judge(self.figures, self.writer, self.whole, place, self.scratch)
                    break
        shutil.rmtree(place)

    def _run(self, place: Path, seconds: float | None) -> bool:
        """Start the calls, kill them after so long; whether they ended by themselves, and well."""
        place.mkdir(exist_ok=True)
        self.scratch.mkdir(exist_ok=True)
        calls = [
            Call(arguments, self.home / f"output-{number}", self.scratch)
            for number, arguments in enumerate(self.writer.at(place))
        ]
        deadline = time.monotonic() + (TIMEOUT if seconds is None else seconds)
        ended = [call.ends_within(max(0.0, deadline - time.monotonic())) for call in calls]
        # those that ended before the others were killed have done their part
        for call in calls:
            call.kill()
        for call in calls:
            said = call.output.read_text(errors="replace")
            self.figures.add("tracebacks", "Traceback" in said, said)
        if seconds is None:
            self.figures.add("hangs", not all(ended), f"still at work after {TIMEOUT} s")
        if not all(ended):
            self.figures.faults += seconds is not None
            return False
        for call in calls:
            said = call.output.read_text(errors="replace")
            # a call that was killed when all was in its place has made it; a repeated one says that it is there
            is_there = (
                call.code == 1 and not self.writer.resumes and ("exists" in said or "holds a reference cache" in said)
            )
            # of two at once one may be told of the other that was killed just now
            self.figures.add("wrong", bool(call.code) and not is_there, f"exit code {call.code}: {said}")
        return True


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_moment_until_it_is_done(name: str, writers: dict[str, Writer], tmp_path: Path) -> None:
    killer = Killer(name, writers[name], tmp_path)
    while killer.figures.faults < KILLS:
        killer.trial()
    killer.figures.end()


@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_a_push_is_killed_at_any_request(repos: Hub, ref_cache: Path, tmp_path: Path, kind: str) -> None:
    """Repeated, it sends what an undisturbed one sends, and leaves nothing of the killed one on this machine."""
    source = ref_cache if kind == "dataset" else train_into(tmp_path / "run", ref_cache)
    figures, scratch = Figures(f"killed: push of a {'cache' if kind == 'dataset' else 'policy'}"), tmp_path / "scratch"
    scratch.mkdir()

    def push(name: str, at: int | None = None) -> int:
        """The exit code; negative if it was killed, when the hub had so many of its requests, or because it hung."""
        begun, end = len(repos.asked), time.monotonic() + TIMEOUT
        command = [sys.executable, "-m", "minicache", "push", str(source), name]
        with (tmp_path / "said").open("wb") as said:
            process = subprocess.Popen(command, stderr=said, stdout=said, env={**os.environ, "TMPDIR": str(scratch)})
            while at is not None and process.poll() is None and len(repos.asked) - begun < at:
                assert time.monotonic() < end, f"request {at} has not come after {TIMEOUT} s"
                time.sleep(0.001)
            if at is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(TIMEOUT)
                figures.add("hangs", process.poll() is None, f"still at work after {TIMEOUT} s")
            process.kill()
            return process.wait()

    def plain(content: bytes, name: str) -> bytes:
        """A file without the repository's name, which a card and its digest have."""
        return re.sub(rb"digest [0-9a-f]{32}", b"digest", content.replace(name.encode(), b"name"))

    assert push("org/undisturbed") == 0, (tmp_path / "said").read_text()
    requests, files = len(repos.asked), repos.repos[kind, "org/undisturbed"].files
    whole = {file: plain(content, "undisturbed") for file, content in files.items()}
    for at in sorted({int(each) for each in np.linspace(1, requests, max(2, KILLS // 2))}):
        name = f"org/killed-{at}"
        with figures.trial():
            # what the hub holds already is not sent again
            repos.lfs.clear()
            figures.faults += push(name, at) < 0
            figures.add("wrong", push(name) != 0, (tmp_path / "said").read_text())
            figures.add("tracebacks", "Traceback" in (tmp_path / "said").read_text(), (tmp_path / "said").read_text())
            sent = {file: plain(content, f"killed-{at}") for file, content in repos.repos[kind, name].files.items()}
            odd = sorted(file for file in {*sent, *whole} if sent.get(file) != whole.get(file))
            figures.add("wrong", bool(odd), f"killed at request {at} of {requests}: {odd[:5]}")
            left = [str(each) for each in scratch.iterdir()]
            figures.add("leftovers", bool(left), f"killed at request {at} of {requests}: {left[:5]}")
    figures.end()


def test_every_writer_is_killed(writers: dict[str, Writer]) -> None:
    assert set(NAMES) == set(writers)


def test_many_at_once_on_one_cache(job: Job, tmp_path: Path) -> None:
    """Whoever comes first makes it; the others are told, or find it made. All killed, nothing holds the next off."""
    cache = tmp_path / "cache"
    for until in (0.2, 0.5, 60):
        processes = []
        for number in range(3):
            output = tmp_path / f"output-{number}"
            processes.append(FORKS.Process(target=run_here, args=([*job.arguments, "--ref-cache", str(cache)], output)))
            processes[-1].start()
        deadline = time.monotonic() + until
        for number, process in enumerate(processes):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                kill_all(process.pid)
                process.join()
                continue
            said = " ".join((tmp_path / f"output-{number}").read_text().split())
            assert "Traceback" not in said
            assert process.exitcode == 0 or "another precompute-ref is writing into this cache" in said, said
    assert 0 in [process.exitcode for process in processes]
    assert_same_store(cache, job.whole)
