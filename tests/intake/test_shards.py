"""Stage one as a job array: jobs that know nothing of each other make the store of one process, however they live and die."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from minicache.cache.places.claims import CLAIM_FILE, FileClaim
from minicache.cache.places.opening import claimed
from minicache.cache.places.place import POLL_SECONDS
from minicache.cache.reader import ReferenceCache
from minicache.drafts import draft_of
from minicache.errors import CacheMismatch, ConfigError, DataError, OutputError
from minicache.options.stage_one import PrecomputeConfig
from minicache.reports.contents import read_cache
from minicache.stages.precompute import PrecomputeReport, precompute
from minicache.trackers import Silent
from tests.cache.test_cache import undone
from tests.conftest import Cli, make_rows, one_process, precompute_into, write_jsonl
from tests.helpers.stores import assert_same_store
from tests.stages.test_crash import FORKS, kill_all, rows, run_here, wait_for

PAIRS = 240  # in 60 blocks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_rows(PAIRS, seed=50))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data: Path) -> Path:
    """The store of one process."""
    return precompute_into(tmp_path_factory.mktemp("whole") / "cache", model_dir, data, block_pairs=4)


Start = Callable[..., tuple[ForkServerProcess, Path]]


@pytest.fixture
def start(model_dir: Path, data: Path, tmp_path: Path) -> Start:
    """Begin `precompute-ref` in a process of its own: the process, and the file it writes its output to."""
    names = iter(range(100))

    def start(*arguments: str, cache: str = "cache") -> tuple[ForkServerProcess, Path]:
        output = tmp_path / f"output-{next(names)}"
        output.touch()
        common = ["precompute-ref", "--model", model_dir, "--data", data, "--block-pairs", 4]
        everything = [*map(str, common), *arguments, "--ref-cache", str(tmp_path / cache)]
        process = FORKS.Process(target=run_here, args=(everything, output))
        process.start()
        return process, output

    return start


def said(output: Path) -> str:
    return " ".join(output.read_text().split())


def run(path: Path, model: Path, *files: Path, **options: Any) -> PrecomputeReport:
    config = PrecomputeConfig(str(model), tuple(map(str, files)), path, **{"block_pairs": 4, **options})
    return precompute(config, one_process(), Silent())


def encoding(jobs: dict[str, tuple[ForkServerProcess, Path]]) -> list[str]:
    return [shard for shard, (process, output) in jobs.items() if process.is_alive() and "encoding" in said(output)]


def scoring(jobs: dict[str, tuple[ForkServerProcess, Path]]) -> list[str]:
    return [shard for shard, (process, output) in jobs.items() if process.is_alive() and "scoring" in said(output)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_started_at_once_killed_and_repeated_they_write_the_store_of_one(
    start: Start, whole: Path, tmp_path: Path, seed: int
) -> None:
    """Four jobs in random order; one dies while it takes in the data, one while it scores; both are repeated."""
    cache, chance = tmp_path / "cache", random.Random(seed)
    shards = [f"{number}/4" for number in (1, 2, 3, 4)]
    chance.shuffle(shards)
    jobs = {shard: start("--shard", shard) for shard in shards}
    wait_for(lambda: rows(cache, "pairs") > 4, lambda: True)
    (first,) = encoding(jobs)
    kill_all(jobs[first][0].pid)
    jobs[first][0].join()
    assert ReferenceCache(cache).log.blocks == 0, "the data was taken in before the kill"
    others = {shard: job for shard, job in jobs.items() if shard != first}
    wait_for(lambda: rows(cache, "ref") > chance.randrange(6) and bool(scoring(others)), lambda: True)
    second = chance.choice(scoring(others))
    kill_all(jobs[second][0].pid)
    for process, _ in jobs.values():
        process.join(120)
    ends = {shard: process.exitcode for shard, (process, _) in jobs.items()}
    assert ends == {shard: -signal.SIGKILL if shard in (first, second) else 0 for shard in shards}
    waited = [shard for shard in others if "waiting to encode the data" in said(jobs[shard][1])]
    assert waited, "all jobs started too late to wait for the first"
    assert {block % 4 + 1 for _, block in undone(cache)} <= {int(first[0]), int(second[0])}
    assert int(first[0]) in read_cache(cache).inspection.shards_missing
    for shard in chance.sample([first, second], 2):
        process, output = start("--shard", shard)
        process.join(120)
        assert process.exitcode == 0, output.read_text()
    assert "complete: all 60 blocks are scored" in said(output)
    assert_same_store(cache, whole)


def test_each_scores_its_own_blocks_and_tells_what_is_missing(
    model_dir: Path, data_file: Path, ref_cache: Path, tmp_path: Path, cli: Cli
) -> None:
    cache = tmp_path / "cache"
    options = {"block_pairs": 8}
    report = run(cache, model_dir, data_file, shard="2/3", **options)
    assert (report.scored_blocks, report.missing, report.blocks, report.scored) == ([1, 4], [0, 2, 3], 5, 16)
    found = read_cache(cache).inspection
    assert found.shards == 3 and found.shards_missing == [1, 3] and list(found.unfinished) == ["0", "2", "3"]
    code, stdout, _ = cli("inspect-cache", cache)
    assert "unfinished: block 0, 2-3" in stdout and "shards missing: 1, 3 of 3" in stdout
    code, stdout, _ = cli("inspect-cache", cache, "--json")
    assert json.loads(stdout)["shards_missing"] == [1, 3] and json.loads(stdout)["shards"] == 3
    again = run(cache, model_dir, data_file, shard="2/3", **options)
    assert again.scored_blocks == [] and again.missing == [0, 2, 3]
    run(cache, model_dir, data_file, shard="3/3", **options)
    arguments = ("precompute-ref", "--model", model_dir, "--data", data_file, "--ref-cache", cache, "--block-pairs", 8)
    code, stdout, _ = cli(*arguments, "--shard", "1/3")
    text = " ".join(stdout.split())
    assert code == 0 and "shard 1/3 scored blocks 0, 3" in text and "complete: all 5 blocks are scored" in text
    assert_same_store(cache, ref_cache)
    found = read_cache(cache).inspection
    assert found.complete and found.shards == 3 and found.shards_missing == []
    code, stdout, _ = cli("inspect-cache", cache)
    assert "missing" not in stdout and "unfinished" not in stdout


def test_more_shards_than_blocks_is_no_error(model_dir: Path, data_file: Path, ref_cache: Path, tmp_path: Path) -> None:
    for number in (9, 5, 1, 2, 3, 4):
        report = run(tmp_path / "cache", model_dir, data_file, shard=f"{number}/9", block_pairs=8)
        assert report.scored_blocks == ([number - 1] if number < 6 else [])
    assert_same_store(tmp_path / "cache", ref_cache)


@pytest.mark.slow
def test_a_job_of_several_processes_shares_its_blocks_among_them(
    model_dir: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for shard in ("2/2", "1/2"):
        command = [sys.executable, "-m", "minicache", "precompute-ref", "--model", str(model_dir), "--data", str(data)]
        command += ["--ref-cache", str(cache), "--block-pairs", "4", "--shard", shard, "--nproc", "2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert undone(cache) == ({("ref", block) for block in range(0, 60, 2)} if shard == "2/2" else set())
    table, scores = ReferenceCache(cache).load()
    assert len(table) == PAIRS
    assert abs(scores.logp_mean - ReferenceCache(whole).load().reference.logp_mean).max() < 1e-5


def stopped_while_scoring(start: Start, cache: Path, *arguments: str) -> tuple[ForkServerProcess, Path]:
    """A shard job that has scored something and stands still."""
    before = rows(cache, "ref")
    process, output = start(*arguments)
    wait_for(lambda: rows(cache, "ref") > before, process.is_alive)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    assert process.is_alive(), output.read_text()
    return process, output


def go_on(process: ForkServerProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGCONT)
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.slow
def test_while_a_shard_is_at_work_others_score_but_neither_the_same_nor_a_whole_run(
    start: Start, whole: Path, tmp_path: Path
) -> None:
    first, _ = stopped_while_scoring(start, tmp_path / "cache", "--shard", "1/2")
    same, said_by_same = start("--shard", "1/2")
    everything, said_by_all = start()
    other, said_by_other = start("--shard", "2/2")
    for process in (same, everything, other):
        process.join(120)
    assert same.exitcode == 1 and "another job is at work on --shard 1/2; wait for its end" in said(said_by_same)
    assert everything.exitcode == 1 and "another precompute-ref is writing into this cache" in said(said_by_all)
    assert other.exitcode == 0, said(said_by_other)
    go_on(first)
    assert_same_store(tmp_path / "cache", whole)
    assert not list((tmp_path / "cache").glob("shard-*"))


def test_a_killed_shard_is_finished_by_a_run_without_shard(start: Start, whole: Path, tmp_path: Path) -> None:
    process, _ = stopped_while_scoring(start, tmp_path / "cache", "--shard", "1/2")
    kill_all(process.pid)
    process.join()
    assert list((tmp_path / "cache").glob("shard-*"))
    process, output = start()
    process.join(120)
    assert process.exitcode == 0, said(output)
    assert_same_store(tmp_path / "cache", whole)


@pytest.mark.slow
def test_new_data_and_another_number_of_shards_wait_until_nobody_scores(
    start: Start, model_dir: Path, data: Path, tmp_path: Path
) -> None:
    """The new jobs then score what the old ones have left, too; and the old command still fits."""
    cache, more = tmp_path / "cache", write_jsonl(tmp_path / "more.jsonl", make_rows(30, seed=51))
    old, _ = stopped_while_scoring(start, cache, "--shard", "1/3")
    new = [start("--data", str(more), "--shard", "2/3"), start("--shard", "1/2")]
    for process, output in new:
        wait_for(lambda: "waiting to encode the data" in said(output), process.is_alive)  # noqa: B023
    time.sleep(2 * POLL_SECONDS)
    log = ReferenceCache(cache).log
    assert len(log.sources) == 1 and log.shards == 3 and all(process.is_alive() for process, _ in new)
    go_on(old)
    for process, output in new:
        process.join(120)
        assert process.exitcode == 0, said(output)
    run(cache, model_dir, data, shard="2/2")
    run(cache, model_dir, data, shard="1/2")
    assert_same_store(cache, precompute_into(tmp_path / "whole", model_dir, data, more, block_pairs=4))


@pytest.mark.parametrize("shard", [None, "1/2"])
def test_what_a_job_left_that_was_killed_while_another_made_the_cache_is_removed(
    whole: Path, data: Path, model_dir: Path, tmp_path: Path, shard: str | None
) -> None:
    cache = shutil.copytree(whole, tmp_path / "cache")
    mine = draft_of(cache)
    for draft in (mine, mine.with_name(mine.name.replace(f"-{os.getpid()}-", "-99999999999-"))):
        (draft / "pairs").mkdir(parents=True)
    run(cache, model_dir, data, shard=shard)
    # that of a process at work stays
    assert sorted(place.name for place in tmp_path.iterdir()) == sorted(["cache", mine.name])


@pytest.mark.slow
def test_bad_data_is_told_by_every_job_and_leaves_nothing(start: Start, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in make_rows(40, seed=52)) + "{broken\n")
    jobs = [start("--data", str(bad), "--on-bad-row", "fail", "--shard", f"{number}/3") for number in (1, 2, 3)]
    for process, output in jobs:
        process.join(120)
        assert process.exitcode == 1 and "bad.jsonl:41: broken-json" in said(output), said(output)
        assert "Traceback" not in said(output)
    assert not [item for item in tmp_path.iterdir() if "cache" in item.name]


def test_a_first_job_whose_data_is_bad_does_not_take_the_cache_of_others(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{broken\n")
    with pytest.raises(DataError, match="broken-json"):
        run(cache, model_dir, bad, shard="1/2", block_pairs=8, on_bad_row="fail")
    assert_same_store(cache, ref_cache)


def test_what_is_damaged_or_half_written_of_its_blocks_a_shard_makes_anew(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for number in (1, 2):
        run(cache, model_dir, data_file, shard=f"{number}/2", block_pairs=8)
    leftovers = [cache / f"ref/logp_mean/c/{block}/0/0.abc.partial" for block in (0, 1)]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    run(cache, model_dir, data_file, shard="2/2", block_pairs=8)
    assert [leftover.exists() for leftover in leftovers] == [True, False], "block 0 is another shard's"
    for block in (0, 3):
        (cache / f"pairs/tokens/c/{block}/0").write_bytes(b"")
        (cache / f"ref/logp_mean/c/{block}/0/0").write_bytes(b"")
        run(cache, model_dir, data_file, shard="2/2", block_pairs=8)
    assert undone(cache) == {("ref", 0)}
    run(cache, model_dir, data_file, shard="1/2", block_pairs=8)
    assert_same_store(cache, ref_cache)


def test_another_request_is_refused_at_once_whoever_is_writing(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    with claimed(cache):
        with pytest.raises(CacheMismatch, match="max_length is 1024, asked for 64"):
            run(cache, model_dir, data_file, shard="1/2", block_pairs=8, max_length=64)
        with pytest.raises(CacheMismatch, match="was read with --format auto"):
            cache_log_of_two(cache)
            run(cache, model_dir, data_file, shard="1/2", block_pairs=8, format="messages")


def cache_log_of_two(cache: Path) -> None:
    from minicache.cache.writer import CacheWriter

    writer = CacheWriter(cache)
    writer.log.shards = 2
    writer.write_log()


def test_claims_of_a_file_that_was_taken_away_are_none(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    old, new = FileClaim(tmp_path / "cache" / CLAIM_FILE), FileClaim(tmp_path / "cache" / CLAIM_FILE)
    assert old.take(alone=False) and new.take(alone=False)
    assert not new.take(alone=True)  # and what it had is lost
    assert old.take(alone=True) and not new.take(alone=False)
    shutil.rmtree(tmp_path / "cache")
    assert not old.take(alone=True) and not new.take(alone=True)
    (tmp_path / "cache").mkdir()
    assert new.take(alone=True) and not old.take(alone=False)
    new.release()
    assert old.take(alone=False)
    old.remove()
    assert not list((tmp_path / "cache").iterdir())


def test_where_there_are_no_locks_shards_are_refused(
    model_dir: Path, data_file: Path, ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OutputError, match="its file system has no locks"):
        run(tmp_path / "cache", model_dir, data_file, shard="1/2", block_pairs=8)
    run(tmp_path / "cache", model_dir, data_file, block_pairs=8)
    assert_same_store(tmp_path / "cache", ref_cache)


@pytest.mark.parametrize("shard", ["0/4", "5/4", "-1/4", "0/0", "3", "a/b", "1/2/3", "", "1/", " 1/2", "1.0/2", "³/4"])
def test_nonsense_is_refused_with_what_is_expected(shard: str) -> None:
    with pytest.raises(ConfigError, match="expected K/N with K from 1 to N, such as 3/64, got"):
        PrecomputeConfig("m", ("d",), Path("c"), shard=shard)
