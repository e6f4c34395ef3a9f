"""Output that nobody reads, or that a full disk refuses: the work is done, and the exit code says whether the report is whole."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from minicache.training import checkpoints
from tests.processes.test_signals import train_until

# What the shell is told. "gone": a pipe whose reader has left.
STATES = {
    "stdout closed": ">&-",
    "stdout full": ">/dev/full",
    "stdout gone": "",
    "stderr closed": "2>&-",
    "stderr full": "2>/dev/full",
    "stderr gone": "",
    "all closed": "<&- >&- 2>&-",
    "all gone": "",
}
# Whoever reads a report must learn that it is not whole; that the reader wants no more is no failure.
CODES = {"stdout full": 1}


@contextmanager
def gone() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def run(state: str, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command with its streams in a state."""
    if "full" in state and not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    with gone() as writer:
        return subprocess.run(
            ["sh", "-c", f'exec "$@" {STATES[state]}', "sh", sys.executable, "-m", "minicache", *map(str, words)],
            stdout=writer if state in ("stdout gone", "all gone") else subprocess.PIPE,
            stderr=writer if state in ("stderr gone", "all gone") else subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
            timeout=120,
        )


def commands(cache: Path, out: Path) -> dict[str, tuple[object, ...]]:
    return {
        "a report": ("inspect-cache", cache, "--json"),
        "a file": ("inspect-cache", cache, "--html", out / "made"),
        "a table": ("export", "--ref-cache", cache, "--out", out / "made.jsonl"),
        "the version": ("--version",),
        "help": ("train", "--help"),
    }


@pytest.mark.parametrize("state", STATES)
def test_a_report_that_cannot_be_printed(ref_cache: Path, tmp_path: Path, state: str) -> None:
    done = run(state, *commands(ref_cache, tmp_path)["a file"])
    assert done.returncode == CODES.get(state, 0), done.stderr
    assert (tmp_path / "made").stat().st_size > 1000, "the work is done all the same"
    said = done.stderr or ""
    assert "Traceback" not in said and ("error:" in said) == (state == "stdout full")
    if state == "stdout full":
        assert "error: standard output: cannot be written: No space left on device" in said


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", commands(Path(), Path()))
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_every_kind_of_output(ref_cache: Path, tmp_path: Path, name: str, state: str, unbuffered: str) -> None:
    done = run(state, *commands(ref_cache, tmp_path)[name], PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == CODES.get(state, 0), done.stderr
    assert "Traceback" not in (done.stderr or "") and "Exception" not in (done.stderr or "")


@pytest.mark.parametrize("state", ["stdout full", "stdout gone", "stderr gone"])
def test_an_error_keeps_its_exit_code(tmp_path: Path, state: str) -> None:
    assert run(state, "inspect-cache", tmp_path / "none").returncode == 1
    assert run(state, "train", "--nonsense").returncode == 2


def test_a_training_whose_log_nobody_reads_any_more_saves_when_it_is_stopped(ref_cache: Path, tmp_path: Path) -> None:
    """As below `2>&1 | tee log`, where Ctrl-C ends tee first."""
    process = train_until(3, ref_cache, tmp_path / "run")
    assert process.stdout and process.stderr
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert len(checkpoints.steps(tmp_path / "run")) == 1


def test_no_file_gets_the_number_of_a_stream_that_was_closed(tmp_path: Path) -> None:
    """What C libraries and child processes say to descriptor 2 would be written into it."""
    script = (
        "import os, sys; from minicache.processes.streams import Outlets\n"
        "with Outlets(print):\n    file = open(sys.argv[1], 'wb'); os.write(2, b'x'); print('y'); print('z', file=sys.stderr)"
    )
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", script, str(tmp_path / "file")]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""
