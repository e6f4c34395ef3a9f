"""Pairs decoded into a file: the values of those in memory, one copy for all processes, nothing left behind."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.cache.scratch import ScratchFile, map_scratch
from minicache.errors import CacheDamaged, OutputError
from minicache.options.dictionaries import fill
from minicache.options.others import EvaluateConfig
from minicache.options.train import TrainConfig
from minicache.scoring import loading as load
from minicache.scoring.loading import load_pairs
from minicache.stages.evaluate import evaluate
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.cache.test_cache import build
from tests.conftest import make_rows, one_process, precompute_into, write_jsonl
from tests.helpers.stores import chunk_files
from tests.helpers.worlds import start_world
from tests.processes.test_parallel import assert_same_curve, options_of, run_world


class Told(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def assert_same(left: CachedPairs, right: CachedPairs) -> None:
    compared: Iterable[tuple[Any, Any]] = zip(left, right, strict=True)
    for mine, its in compared:
        for item in fields(mine):
            a, b = getattr(mine, item.name), getattr(its, item.name)
            if a is None:
                assert b is None
                continue
            assert a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), item.name


@pytest.mark.parametrize("name", ["per token", "scored"])
def test_a_file_holds_what_memory_holds(name: str, ref_cache: Path, tmp_path: Path) -> None:
    path = ref_cache
    if name == "per token":
        path = tmp_path / "cache"
        build(path)
    (tmp_path / "scratch").mkdir()
    cache = ReferenceCache(path)
    found = load_pairs(cache, tmp_path / "scratch", one_process(), Silent())
    assert_same(cache.load(), found)
    assert not found.table.tokens.flags.writeable
    assert not list((tmp_path / "scratch").iterdir())


def test_the_bytes_asked_for_hold_the_columns_and_little_more(ref_cache: Path) -> None:
    cache = ReferenceCache(ref_cache)
    cached = cache.load()
    held = sum(array.nbytes for part in cached for array in vars(part).values() if array is not None)
    assert held <= cache.contents.decoded_bytes < held + 64 * 8
    with pytest.raises(TypeError):
        cache.contents.load(bytearray(cache.contents.decoded_bytes - 64))


@pytest.mark.parametrize(("share", "is_file"), [(1e-12, True), (0.25, False)])
def test_a_file_is_taken_where_memory_is_too_small(
    share: float, is_file: bool, ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "MOST", share)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    told = Told()
    found = load_pairs(ReferenceCache(ref_cache), None, one_process(), told)
    assert found.table.tokens.flags.writeable != is_file
    assert [f"into a file in {tmp_path}" in line for line in told.notes] == [True] * is_file


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may have more than 1,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_no_room(work: Callable[[], object], why: str) -> None:
    with pytest.raises(
        OutputError, match=rf"cannot hold [0-9,.]+ MB of decoded pairs: {why}; name a directory"
    ) as caught:
        work()
    assert "\n" not in str(caught.value)


def test_no_room_is_one_line_and_nothing_is_left(ref_cache: Path, tmp_path: Path, small_files: None) -> None:
    assert_no_room(lambda: load_pairs(ReferenceCache(ref_cache), tmp_path, one_process(), Silent()), "it has no room")
    absent = tmp_path / "absent"
    assert_no_room(
        lambda: load_pairs(ReferenceCache(ref_cache), absent, one_process(), Silent()), "No such file or directory"
    )
    assert not list(tmp_path.iterdir())


def test_a_disk_with_less_than_is_needed(tmp_path: Path) -> None:
    made = ScratchFile(tmp_path / "file", 10 * shutil.disk_usage(tmp_path).free)
    assert_no_room(made.reserve, "it has no room")
    made.close()
    assert not list(tmp_path.iterdir())


def test_damage_is_found_and_nothing_is_left(ref_cache: Path, tmp_path: Path) -> None:
    path, scratch = shutil.copytree(ref_cache, tmp_path / "cache"), tmp_path / "scratch"
    scratch.mkdir()
    file = next(file for file in chunk_files(path) if "tokens" in str(file))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CacheDamaged, match="pairs/tokens, block 0"):
        load_pairs(ReferenceCache(path), scratch, one_process(), Silent())
    assert not list(scratch.iterdir())


def test_every_mapping_sees_what_one_process_writes(tmp_path: Path) -> None:
    made = ScratchFile(tmp_path / "file", 5000)
    seen = map_scratch(tmp_path / "file", 5000)
    made.unname()
    made.reserve()
    made.buffer[4990:4994] = b"pair"
    assert seen[4990:4994] == b"pair"
    with pytest.raises(OutputError, match="No such file"):
        map_scratch(tmp_path / "file", 5000)
    made.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from minicache.cache.blocks import Blocks
from minicache.cache.reader import ReferenceCache
from minicache.scoring.loading import load_pairs
from minicache.trackers import Silent
from tests.conftest import one_process
read = Blocks.ref
def dies(self, block):
    if block == 2:  # its pairs are in the file already
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, block)
Blocks.ref = dies
load_pairs(ReferenceCache(Path(sys.argv[1])), Path(sys.argv[2]), one_process(), Silent())
"""


def test_a_kill_while_decoding_leaves_nothing(ref_cache: Path, tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(ref_cache), str(tmp_path)], cwd=Path(__file__).parents[2], timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


# --- in the stages ---


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("few")
    return precompute_into(directory / "cache", model_dir, write_jsonl(directory / "pairs.jsonl", make_rows(20)))


def test_a_run_from_a_file_is_the_run_from_memory_in_one_process_and_two(few: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    options: Callable[..., dict[str, Any]] = lambda name, **more: options_of("validated", few, tmp_path / name, **more)  # noqa: E731
    train(fill(TrainConfig, options("memory")), one_process(), Silent())
    train(fill(TrainConfig, options("file", scratch=scratch)), one_process(), Silent())
    run_world(2, [("train", options("two", scratch=scratch))], tmp_path / "world")
    assert (tmp_path / "memory/metrics.jsonl").stat().st_size
    for name, tolerance in (("file", 0.0), ("two", 1e-5)):
        assert_same_curve(tmp_path / "memory", tmp_path / name, tolerance)
    assert not list(scratch.iterdir())
    assert json.loads((tmp_path / "two/run.json").read_text())["scratch"] == str(scratch)


def test_evaluate_from_a_file(few: Path, model_dir: Path, tmp_path: Path) -> None:
    reports = [
        evaluate(EvaluateConfig(str(model_dir), few, scratch=scratch), one_process(), Silent())
        for scratch in (None, tmp_path)
    ]
    assert reports[0] == reports[1]


WORLD = """
import json, os, sys
from pathlib import Path
from minicache.cache.reader import ReferenceCache
from minicache.processes.world import join_world, leave_world
from minicache.errors import MinicacheError
from minicache.scoring.loading import load_pairs
from minicache.trackers import Silent
world, (cache, scratch) = join_world(), map(Path, sys.argv[1:])
mapped = lambda: {line.split()[4] for line in open("/proc/self/maps") if "minidpo-" in line}
try:
    table = load_pairs(ReferenceCache(cache), scratch, world, Silent()).table
    print(json.dumps([int(table.tokens.sum()), sorted(mapped())]))
except MinicacheError as error:
    print(json.dumps(str(error)))
leave_world()
"""


def in_world(size: int, cache: Path, scratch: Path) -> list[Any]:
    """What each process says; two to a machine."""
    processes = start_world(size, "-c", WORLD, cache, scratch, per_node=2, stdout=subprocess.PIPE)
    return [json.loads(process.communicate(timeout=120)[0]) for process in processes]


@pytest.mark.slow
def test_the_processes_of_a_machine_share_one_file(ref_cache: Path, tmp_path: Path) -> None:
    said = in_world(4, ref_cache, tmp_path)
    assert {tokens for tokens, _ in said} == {int(ReferenceCache(ref_cache).load().table.tokens.sum())}
    inodes = [places for _, places in said]
    assert inodes[0] == inodes[1] != inodes[2] == inodes[3]
    assert all(len(places) == 1 for places in inodes)


def test_all_processes_end_where_one_cannot_go_on(ref_cache: Path, tmp_path: Path) -> None:
    said = in_world(2, ref_cache, tmp_path / "absent")
    assert said[0] == said[1] and "cannot hold" in said[0]
