"""Real processes, really killed; and two of them writing one store."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheDamaged, CacheError, CacheIncomplete
from tests.conftest import make_rows, precompute_into, write_jsonl
from tests.helpers.stores import assert_same_store

PAIRS = 200  # in 25 blocks
# A server that has imported everything forks each process of ours in no time; started anew, each would import torch for seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "minicache.cli",
        "minicache.stages.precompute",
        "transformers.models.llama.modeling_llama",
        "tests.stages.test_crash",
    ]
)


@dataclass
class Job:
    """A command that takes a while, and the store it makes when left alone."""

    arguments: list[str]
    whole: Path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Job:
    directory = tmp_path_factory.mktemp("job")
    data = write_jsonl(directory / "pairs.jsonl", make_rows(PAIRS))
    arguments = ["precompute-ref", "--model", str(model_dir), "--data", str(data)]
    arguments += ["--block-pairs", "8", "--tokens-per-batch", "500"]
    return Job(arguments, precompute_into(directory / "whole", model_dir, data, tokens_per_batch=500))


@pytest.fixture(scope="module")
def on_one_thread(job: Job) -> Path:
    """The store of one process that has one thread, as each of several has: the order of sums depends on their number."""
    whole = job.whole.with_name("one-thread")
    command = [sys.executable, "-m", "minicache", *job.arguments, "--ref-cache", str(whole)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    return whole


def run_here(arguments: list[str], output: Path) -> None:
    """The program, in a process and a process group of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["minidpo", *arguments]
    from minicache.cli import main

    main()


def fork(arguments: list[str], cache: Path) -> ForkServerProcess:
    process = FORKS.Process(target=run_here, args=([*arguments, "--ref-cache", str(cache)], cache.with_name("output")))
    process.start()
    return process


def finish(arguments: list[str], cache: Path) -> None:
    process = fork(arguments, cache)
    process.join(120)
    assert process.exitcode == 0, cache.with_name("output").read_text()


def finished(cache: Path) -> dict[tuple[str, int], bytes]:
    """Blocks that are done, encoded ("pairs") or scored ("ref"), and all their bytes on disk."""
    done: dict[tuple[str, int], bytes] = {}
    with suppress(CacheError):
        store = ReferenceCache(cache).blocks
        for what, read in (("pairs", store.pairs), ("ref", store.ref)):
            for block in range(len(store)):
                with suppress(CacheIncomplete, CacheDamaged):
                    read(block)
                    names = [*(name for name in store.arrays.specs if name.startswith(f"{what}/")), f"ledger/{what}"]
                    places = [place for name in names for place in sorted((cache / name / "c" / str(block)).rglob("*"))]
                    done[what, block] = b"".join(place.read_bytes() for place in places if place.is_file())
    return done


def rows(cache: Path, what: str) -> int:
    ledger = cache / "ledger" / what / "c"
    return len(list(ledger.iterdir())) if ledger.exists() else 0


def wait_for(condition: Callable[[], bool], is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and is_running() and time.monotonic() < deadline:
        time.sleep(0.002)


def kill_all(group: int | None, number: int = signal.SIGKILL) -> None:
    assert group is not None
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def test_killed_at_random_moments_and_resumed_the_store_is_the_same(job: Job, tmp_path: Path) -> None:
    cache, chance = tmp_path / "cache", random.Random(0)
    done: dict[tuple[str, int], bytes] = {}
    kills = 0
    for what in ["pairs"] * 3 + ["ref"] * 3:  # make torture: a hundred, at any moment
        process = fork(job.arguments, cache)
        goal = rows(cache, what) + chance.randrange(5)
        wait_for(lambda: rows(cache, what) >= goal, process.is_alive)  # noqa: B023
        time.sleep(chance.random() * 0.05)
        kills += process.is_alive()
        kill_all(process.pid)
        process.join()
        now = finished(cache)
        assert done.items() <= now.items(), "a finished block was lost or rewritten"
        done = now
    assert kills >= 4, f"{kills} of 6 processes were still running when they were to be killed"
    finish(job.arguments, cache)
    assert done.items() <= finished(cache).items()
    assert_same_store(cache, job.whole)


def start(arguments: list[str], cache: Path, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "minicache", *arguments, "--ref-cache", str(cache)],
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        # a shell's background job ignores SIGINT, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_two_ranks_killed_and_interrupted_and_resumed_write_the_store_of_one(
    job: Job, on_one_thread: Path, tmp_path: Path
) -> None:
    cache, arguments = tmp_path / "cache", [*job.arguments, "--nproc", "2"]
    done: dict[tuple[str, int], bytes] = {}
    for what, number in (("pairs", signal.SIGKILL), ("ref", signal.SIGKILL), ("ref", signal.SIGINT)):
        process = start(arguments, cache)
        goal = rows(cache, what) + 3
        wait_for(lambda: rows(cache, what) >= goal, lambda: process.poll() is None)  # noqa: B023
        kill_all(process.pid, number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), stderr
        assert "Traceback" not in stderr
        now = finished(cache)
        assert done.items() < now.items(), "a finished block was lost or rewritten"
        done = now
    process = start(arguments, cache)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert done.items() <= finished(cache).items()
    assert_same_store(cache, on_one_thread)


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ((), ("--nproc", "2")),
        pytest.param(
            ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), (), marks=pytest.mark.slow
        ),
    ],
    ids=["nproc", "torchrun"],
)
def test_two_ranks_write_the_store_of_one(
    job: Job, on_one_thread: Path, tmp_path: Path, launcher: tuple[str, ...], options: tuple[str, ...]
) -> None:
    process = start([*job.arguments, *options], tmp_path / "cache", launcher)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert_same_store(tmp_path / "cache", on_one_thread)


def test_interrupted_by_hand_it_says_so_and_goes_on_later(job: Job, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for what in ("pairs", "ref"):
        process = fork(job.arguments, cache)
        wait_for(lambda: rows(cache, what) > 0, process.is_alive)  # noqa: B023
        kill_all(process.pid, signal.SIGINT)
        process.join(60)
        output = (tmp_path / "output").read_text()
        assert process.exitcode == 130 and "interrupted" in output and "Traceback" not in output, output
    done = finished(cache)
    finish(job.arguments, cache)
    assert done and done.items() <= finished(cache).items()
    assert_same_store(cache, job.whole)


def test_a_second_run_on_the_same_cache_ends_at_once_and_harms_nothing(job: Job, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = fork(job.arguments, cache)
    wait_for(lambda: rows(cache, "pairs") > 0, first.is_alive)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)
    second = FORKS.Process(target=run_here, args=([*job.arguments, "--ref-cache", str(cache)], tmp_path / "second"))
    second.start()
    second.join(60)
    os.kill(first.pid, signal.SIGCONT)
    said = " ".join((tmp_path / "second").read_text().split())
    assert second.exitcode == 1 and "another precompute-ref is writing into this cache" in said, said
    first.join(60)
    assert first.exitcode == 0
    assert_same_store(cache, job.whole)


def test_an_error_of_several_processes_is_one_line(job: Job, tmp_path: Path) -> None:
    broken = write_jsonl(tmp_path / "empty.jsonl", [])
    process = start([*job.arguments, "--data", str(broken), "--nproc", "2"], tmp_path / "cache")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    errors = [line for line in stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and "the file is empty" in errors[0] and "Traceback" not in stderr


def test_pairs_without_scores_are_not_trained_on(job: Job, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = fork(job.arguments, cache)
    wait_for(lambda: rows(cache, "ref") > 0, process.is_alive)
    kill_all(process.pid)
    process.join()
    process = fork(["train", "--out", str(tmp_path / "run")], cache)
    process.join(60)
    said = " ".join((tmp_path / "output").read_text().split())
    assert process.exitcode == 1 and "run the same precompute-ref again" in said, said
    assert not (tmp_path / "run").exists()
