"""Real processes, really killed; and two of them writing one store."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheError
from tests.conftest import make_rows, precompute_into, write_jsonl
from tests.stores import assert_same_store

PAIRS = 400


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[list[str], Path]:
    """A command that takes seconds, and the store it makes when left alone."""
    directory = tmp_path_factory.mktemp("job")
    data = write_jsonl(directory / "pairs.jsonl", make_rows(PAIRS))
    command = [sys.executable, "-m", "minicache", "precompute-ref", "--model", str(model_dir), "--data", str(data)]
    command += ["--block-pairs", "8", "--tokens-per-batch", "2000"]
    return command, precompute_into(directory / "whole", model_dir, data, tokens_per_batch=2000)


def start(command: list[str], cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, "--ref-cache", str(cache)],
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        # a shell's background job ignores SIGINT, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(command: list[str], cache: Path) -> str:
    done = subprocess.run([*command, "--ref-cache", str(cache)], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finished_blocks(cache: Path) -> dict[int, bytes]:
    """Ledger rows of the blocks that are done, as they lie on disk."""
    try:
        store = ReferenceCache(cache)
    except CacheError:
        return {}
    done = set(range(store.blocks)) - store.unfinished("ref").keys()
    return {block: (cache / "ledger" / "ref" / "c" / str(block) / "0").read_bytes() for block in done}


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_and_resumed_the_store_is_the_same(job, tmp_path: Path, processes: int) -> None:
    command, whole = job
    command = [*command, "--nproc", str(processes)]
    cache, chance = tmp_path / "cache", random.Random(processes)
    done: dict[int, bytes] = {}
    kills = 0
    for attempt in range(5 - processes):
        process = start(command, cache)
        # the first two kills fall into encoding, the others into scoring: each as soon as something new is there
        ledger = cache / "ledger" / ("pairs" if attempt < 2 else "ref") / "c"
        before = len(list(ledger.glob("*"))) if ledger.exists() else 0
        goal = before + chance.randint(1, 12)
        wait_for(lambda: ledger.exists() and len(list(ledger.glob("*"))) >= goal, process)  # noqa: B023
        time.sleep(chance.random() * 0.02)
        kills += process.poll() is None
        kill(process) if process.poll() is None else process.communicate()
        now = finished_blocks(cache)
        assert done.items() <= now.items(), "a finished block was lost or rewritten"
        done = now
    assert kills >= 2
    assert "400" in finish(command, cache)
    assert_same_store(cache, whole)


@pytest.mark.parametrize("launcher", ["--nproc", "torchrun"])
def test_two_ranks_write_the_store_of_one(job, tmp_path: Path, launcher: str) -> None:
    command, whole = job
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minicache"]
        command = [sys.executable, *torchrun, *command[3:]]
    else:
        command = [*command, "--nproc", "2"]
    finish(command, tmp_path / "cache")
    assert_same_store(tmp_path / "cache", whole)


def test_interrupted_by_hand_it_says_so_and_goes_on_later(job, tmp_path: Path) -> None:
    command, _ = job
    # more pairs than can be scored before the signal arrives, however busy the machine
    command = [*command, "--data", str(write_jsonl(tmp_path / "more.jsonl", make_rows(1500, seed=1)))]
    cache = tmp_path / "cache"
    process = start(command, cache)
    wait_for(lambda: (cache / "ledger" / "ref" / "c").exists(), process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr and "Traceback" not in stderr
    done = finished_blocks(cache)
    finish(command, cache)
    assert done and done.items() <= finished_blocks(cache).items() and not list(ReferenceCache(cache).verify())


def test_an_error_of_several_processes_is_one_line(job, tmp_path: Path) -> None:
    command, _ = job
    broken = write_jsonl(tmp_path / "empty.jsonl", [])
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--data", str(broken), "--ref-cache", str(tmp_path / "cache"), "--nproc", "2"],
        text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and time.monotonic() - started < 30
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and "the file is empty" in errors[0] and "Traceback" not in done.stderr


def test_pairs_without_scores_are_not_trained_on(job, tmp_path: Path) -> None:
    command, _ = job
    cache = tmp_path / "cache"
    process = start(command, cache)
    wait_for(lambda: (cache / "ledger" / "ref" / "c").exists(), process)
    kill(process)
    done = subprocess.run(
        [sys.executable, "-m", "minicache", "train", "--ref-cache", str(cache), "--out", str(tmp_path / "run")],
        text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "run the same precompute-ref again" in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists() and np.isfinite(ReferenceCache(cache).blocks)
