"""Processes that die, restarts, two nodes: real processes, launched as users launch them."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from minicache.cache.reader import ReferenceCache
from minicache.cache.writer import CacheWriter
from minicache.errors import CacheError, ConfigError
from minicache.processes.world import join_world
from minicache.training import checkpoints
from tests.conftest import make_rows, one_process, precompute_into, write_jsonl
from tests.training.test_resume import assert_same_run

TRAIN = ["--batch-size", "8", "--lr", "1e-3", "--epochs", "5", "--log-every", "1", "--save-every", "2"]
TRAIN += ["--tokens-per-micro-batch", "200", "--keep-last", "100"]
KILLS = int(os.environ.get("MINICACHE_KILLS", 2))  # at random moments, of each stage
# The first decides; make test-all tries other moments too.
ATTEMPTS = [pytest.param(each, marks=[pytest.mark.slow] if each else []) for each in range(KILLS)]


def minidpo(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "minicache", *map(str, arguments)]


def torchrun(*options: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *map(str, options), "-m", "minicache"]


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def finish(process: subprocess.Popen[str], seconds: float = 120) -> str:
    """What it said, once it has ended well."""
    told: str = process.communicate(timeout=seconds)[1]
    assert process.returncode == 0, told
    return told


def ranks_of(parent: int) -> list[int]:
    """Process ids of the ranks that a launcher started, in their order."""
    return sorted(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))


def until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_logged(out: Path) -> int:
    file = out / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@contextmanager
def one_rank_killed(process: subprocess.Popen[str]) -> Iterator[None]:
    """Within: wait for the moment. Then one of the two dies, and all must be over within a minute."""
    yield
    ranks = ranks_of(process.pid)
    os.kill(random.choice(ranks[-2:]), signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    text = " ".join(told.split())
    assert process.returncode == 1, told
    assert "Traceback" not in told
    assert "was killed (SIGKILL" in text and "the same command goes on with it" in text
    time.sleep(0.5)
    assert all(not Path(f"/proc/{rank}").exists() for rank in ranks), "no process is left behind"


@pytest.fixture(scope="module")
def whole(ref_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two processes that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(minidpo("train", "--ref-cache", ref_cache, "--out", out, *TRAIN, "--nproc", 2))
    finish(process)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_killed_rank_ends_training_and_the_same_command_goes_on(
    attempt: int, ref_cache: Path, whole: Path, tmp_path: Path
) -> None:
    random.seed(attempt)
    command = minidpo("train", "--ref-cache", ref_cache, "--out", tmp_path / "run", *TRAIN, "--nproc", 2)
    process = start(command)
    last = random.randrange(1, steps_logged(whole) - 5)
    with one_rank_killed(process):
        until(lambda: steps_logged(tmp_path / "run") >= last, process)
    assert not (tmp_path / "run" / "model").exists()
    finish(start([*command, "--resume"]))
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_killed_rank_ends_stage_one_and_loses_no_finished_block(
    attempt: int, model_dir: Path, tmp_path: Path
) -> None:
    random.seed(attempt)
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(300))
    whole = precompute_into(tmp_path / "whole", model_dir, data, block_pairs=16, tokens_per_batch=200)
    command = minidpo("precompute-ref", "--model", model_dir, "--data", data, "--ref-cache", tmp_path / "cache")
    command += ["--block-pairs", "16", "--tokens-per-batch", "200", "--nproc", "2"]
    process = start(command)
    first = random.randrange(1, 10)

    def scored() -> int:
        try:
            cache = CacheWriter(tmp_path / "cache")
            return len(cache.blocks) - len(cache.blocks.unscored())
        except CacheError:
            return 0

    with one_rank_killed(process):
        until(lambda: scored() >= first, process)
    kept = scored()
    assert kept >= first
    finish(start(command))
    expected, found = (ReferenceCache(path).load() for path in (whole, tmp_path / "cache"))
    assert np.array_equal(expected.table.digest, found.table.digest)
    assert np.abs(expected.reference.logp_mean - found.reference.logp_mean).max() < 1e-5


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(ref_cache: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher = torchrun("--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "--monitor-interval", 0.1)
    process = start([*launcher, "train", "--ref-cache", str(ref_cache), "--out", str(out), *TRAIN])
    until(lambda: steps_logged(out) >= 5 and bool(checkpoints.steps(out)), process)
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    finish(process)
    assert_same_run(whole, out)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: expected a number of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected a number of at least 1"),
        ({"RANK": "-1"}, "RANK=-1: expected a number of at least 0"),
        ({"RANK": "1"}, "RANK=1: expected one below WORLD_SIZE, which is 1"),
        ({"LOCAL_RANK": "²"}, "LOCAL_RANK=²: expected a number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK=: expected a number"),
    ],
)
def test_a_launchers_variable_that_is_no_such_number_is_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(said)):
        join_world("cpu")


@pytest.mark.parametrize("value", ["x", "0", "1.0"])
def test_so_is_the_number_of_processes_on_a_machine(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    with pytest.raises(ConfigError, match=f"LOCAL_WORLD_SIZE={value}: expected a number of at least 1"):
        _ = one_process().local_size


def test_restarts_on_several_nodes_ask_for_torchruns_other_store(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "WORLD_SIZE": 4,
        "LOCAL_WORLD_SIZE": 2,
        "TORCHELASTIC_MAX_RESTARTS": 3,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node"):
        join_world()


@pytest.mark.slow
def test_two_nodes_are_one_run(ref_cache: Path, whole: Path, tmp_path: Path) -> None:
    """Two of torchrun's agents, one process each, that find each other in this process's store."""
    c10d: Any = dist
    store = c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{store.port}", "--rdzv-conf", "is_host=0")
    agent = torchrun("--nnodes", 2, "--nproc-per-node", 1, *place)
    arguments = ["train", "--ref-cache", str(ref_cache), "--out", str(tmp_path / "run"), *TRAIN]
    agents = [start([*agent, *arguments]) for _ in range(2)]
    for each in agents:
        finish(each)
    assert_same_run(whole, tmp_path / "run")
