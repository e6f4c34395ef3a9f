"""SIGKILL at any moment, again and again, in both stages, until they have finished all the same."""

import json
import random
import shutil
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.helpers.stores import assert_same_store
from tests.stages.test_crash import FORKS, Job, finished, fork, job, kill_all, run_here
from tests.training.test_resume import assert_same_run

__all__ = ["job"]  # a fixture
MOST_STARTS = 200
LEFTOVERS = (".saving", ".gone", ".draft", ".part")


def lives_for(process: ForkServerProcess, seconds: float) -> bool:
    """Whether it had to be killed after so long."""
    process.join(seconds)
    alive = process.is_alive()
    if alive:
        kill_all(process.pid)
        process.join()
    return alive


@pytest.mark.parametrize("seed", range(3))
def test_stage_one_killed_at_any_moment_until_it_is_done(job: Job, tmp_path: Path, seed: int) -> None:
    """Each time it may live a little longer, so that it comes to its end however slow the machine is. No lock is left."""
    cache, chance, kills = tmp_path / "cache", random.Random(seed), 0
    done: dict[tuple[str, int], bytes] = {}
    for start in range(MOST_STARTS):
        process = fork(job.arguments, cache)
        if not lives_for(process, chance.random() * (0.3 + start * 0.05)):
            assert process.exitcode == 0, (tmp_path / "output").read_text()
            break
        kills += 1
        now = finished(cache)
        assert done.items() <= now.items(), "a finished block was lost or rewritten"
        done = now
    assert process.exitcode == 0 and kills >= 5
    assert_same_store(cache, job.whole)
    assert {item.name for item in tmp_path.iterdir()} == {"cache", "output"}


@pytest.mark.parametrize("seed", range(2))
def test_training_killed_at_any_moment_until_it_is_done(ref_cache: Path, tmp_path: Path, seed: int) -> None:
    """Bit for bit the run that nobody killed: numbers, checkpoints and model."""
    options = [
        "train",
        "--ref-cache",
        str(ref_cache),
        "--batch-size",
        "8",
        "--lr",
        "1e-3",
        "--epochs",
        "4",
        "--log-every",
        "1",
    ]
    options += ["--tokens-per-micro-batch", "70", "--save-every", "2", "--resume"]

    def started(out: Path) -> ForkServerProcess:
        process = FORKS.Process(target=run_here, args=([*options, "--out", str(out)], tmp_path / "output"))
        process.start()
        return process

    whole = started(tmp_path / "whole")
    begun = time.monotonic()
    whole.join(300)
    usual = time.monotonic() - begun
    assert whole.exitcode == 0, (tmp_path / "output").read_text()
    chance, kills = random.Random(seed), 0
    for start in range(MOST_STARTS):
        process = started(tmp_path / "run")
        if not lives_for(process, chance.random() * usual * (0.6 + start * 0.1)):
            assert process.exitcode == 0, (tmp_path / "output").read_text()
            break
        kills += 1
        if (tmp_path / "run" / "model").exists():
            assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert process.exitcode == 0 and kills >= 2
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert not [file for file in (tmp_path / "run").rglob("*") if file.suffix in LEFTOVERS]
    shutil.rmtree(tmp_path / "whole")


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
            if lives_for(process, max(0.0, deadline - time.monotonic())):
                continue
            said = " ".join((tmp_path / f"output-{number}").read_text().split())
            assert "Traceback" not in said
            assert process.exitcode == 0 or "another precompute-ref is writing into this cache" in said, said
    assert 0 in [process.exitcode for process in processes]
    assert_same_store(cache, job.whole)
