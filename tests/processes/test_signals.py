"""A burst of signals while a process stops: it saves, says one line and ends with 130, whatever moment they come at."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minicache.processes.signals import ONE_REQUEST, Interruptible, Postponed, StopFlag
from minicache.training import checkpoints

BURST = 50


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "minicache", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # ignored where pytest runs in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def burst(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    """So many signals within these seconds, or until it has ended; its exit code and what it said."""
    for _ in range(BURST):
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGINT)
        time.sleep(seconds / BURST)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, " ".join(stderr.split())


def train_until(lines: int, ref_cache: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    options = ("--batch-size", 8, "--log-every", 1, "--epochs", 4000, "--tokens-per-micro-batch", 256)
    process = start("train", "--ref-cache", ref_cache, "--out", out, *options, *more)
    journal = out / "metrics.jsonl"
    while not journal.exists() or len(journal.read_text().splitlines()) < lines:
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1]
    return process


@pytest.mark.parametrize("seconds", [0.2, pytest.param(0.9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_burst_ends_a_run_with_130_and_its_state_saved(
    ref_cache: Path, tmp_path: Path, seconds: float, processes: int
) -> None:
    out = tmp_path / "run"
    process = train_until(3, ref_cache, out, "--nproc", processes)
    code, said = burst(process, seconds)
    assert code == 130 and "Traceback" not in said, said
    assert "--resume goes on" in said and len(checkpoints.steps(out)) == 1


def exit_code(*lines: str) -> int:
    """Of a process that runs these lines within CommandLine's context."""
    script = ["import signal, time", "from minicache.processes.signals import CommandLine, Interruptible"]
    script += ["with CommandLine():", *(f"    {line}" for line in lines)]
    return subprocess.run([sys.executable, "-c", "\n".join(script)], timeout=60).returncode


INTERRUPTED = ("try:", "    with Interruptible(): signal.raise_signal(signal.SIGINT)", "except KeyboardInterrupt: pass")
SIGNAL = "signal.raise_signal(signal.SIGINT)"


def test_a_process_that_is_leaving_ends_at_once_only_when_it_is_asked_again() -> None:
    assert exit_code(*INTERRUPTED, SIGNAL, SIGNAL, "raise SystemExit(5)") == 5
    assert exit_code(*INTERRUPTED, f"time.sleep({ONE_REQUEST + 0.2})", SIGNAL, "raise SystemExit(5)") == 130


def test_copies_of_a_request_do_not_kill_a_process_in_its_last_moments() -> None:
    """Python takes its own handlers down before it calls what was registered first."""
    last = "class Last:\n        def __del__(self): signal.raise_signal(signal.SIGINT)"
    assert exit_code(last, "kept = Last()", *INTERRUPTED, "raise SystemExit(5)") == 5


@pytest.mark.parametrize("before", [(), ("with Interruptible(): pass",)])
def test_before_and_after_all_work_a_signal_ends_the_process(before: tuple[str, ...]) -> None:
    assert exit_code(*before, SIGNAL, "raise SystemExit(5)") == 130


def test_a_signal_that_comes_within_a_destructor_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    """Python drops what is raised there, with a traceback."""
    noisy = "class Noisy:\n        def __del__(self): signal.raise_signal(signal.SIGTERM)"
    work = ("try:", "    with Interruptible():", "        Noisy()", "        for _ in range(1000): time.sleep(0.01)")
    assert exit_code(noisy, *work, "except KeyboardInterrupt: raise SystemExit(6)") == 6
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process that is sent a signal")
def test_a_signal_that_does_not_end_the_waiting_for_a_lock_is_heard() -> None:
    """As one that comes just before the waiting; here another thread takes it."""
    send = "lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)"
    lines = ("import threading", "lock = threading.Lock()", "lock.acquire()", f"threading.Timer(0.5, {send}).start()")
    wait = ("try:", "    with Interruptible(): lock.acquire()", "except KeyboardInterrupt: raise SystemExit(6)")
    assert exit_code(*lines, *wait) == 6
    # what the main thread heard is not sent again
    work = ("try:", "    with Interruptible(): lock.acquire(timeout=5)", "except KeyboardInterrupt: time.sleep(1.5)")
    assert exit_code(*lines[:3], f"threading.Timer(0.5, {send}).start()", *work, "raise SystemExit(7)") == 7


def test_a_signal_that_an_inner_context_received_counts_in_the_outer_one_too() -> None:
    """A copy that comes after the first context is no second request."""
    with Interruptible() as outer:
        with StopFlag() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert inner and outer.since == inner.since
        signal.raise_signal(signal.SIGTERM)


def test_a_request_during_imports_waits_for_their_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Interruptible(), Postponed():
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        done.append("imported")
    assert done == ["imported"]
    with Postponed():
        done.append("nobody asked")
    assert len(done) == 2
