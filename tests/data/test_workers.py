"""Rows encoded by several processes: the same pairs, refusals and errors in the same order as by one; nothing is left running."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from minicache.data import workers
from minicache.data.columns import Reading
from minicache.data.encode import CHUNK, Encoder
from minicache.data.files import read_rows
from minicache.data.tokenizers import ChatTokenizer
from minicache.data.workers import Result, Row, RowEncoder
from minicache.errors import ConfigError, DataError, OutputError, RowRefused
from tests.conftest import make_rows, precompute_into, write_jsonl
from tests.helpers.stores import assert_same_store


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers, from the second chunk on."""
    monkeypatch.setattr(workers, "ALONE", CHUNK)
    monkeypatch.setattr(workers, "cores", lambda: 2)


@pytest.fixture
def encoder(tokenizer_dir: Path) -> RowEncoder:
    return RowEncoder(Encoder(ChatTokenizer.load(tokenizer_dir), 40), "pairs.jsonl", Reading(), 3)


def mixed_rows(count: int) -> list[dict[str, Any]]:
    """Good pairs; among them duplicates, rows that are no pairs, and pairs too long."""
    rows = make_rows(count)
    for index in range(0, count, 17):
        rows[index] = {"prompt": "why", "chosen": "the cat"}
        rows[index + 1 : index + 2] = [rows[0]] if index % 2 else rows[index + 1 : index + 2]
        rows[index + 3 : index + 4] = [{"prompt": "why " * 60, "chosen": "on", "rejected": "a mat"}]
    return rows[:count]


def told(items: Iterator[Result]) -> list[tuple[object, ...]]:
    """Everything about each item."""
    found: list[tuple[object, ...]] = []
    for item in items:
        if isinstance(item, RowRefused):
            found.append((item.reason, str(item), item.line))
        else:
            pair, truncated, _ = item
            dtypes = pair.tokens.dtype, pair.loss_mask.dtype
            found.append((truncated, pair.digest, *dtypes, *(str(value) for value in asdict(pair).values())))
    return found


@pytest.mark.parametrize("count", [CHUNK, CHUNK + 1, 5 * CHUNK + 7])
def test_several_processes_give_what_one_gives(encoder: RowEncoder, tmp_path: Path, count: int) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", mixed_rows(count))
    with file.open("a") as stream:
        stream.write("no json\n\n")
    expected = told(encoder.encode(read_rows(str(file))))
    assert told(encoder.encode_by_all_cores(read_rows(str(file)))) == expected
    assert {row[0] for row in expected} >= {"missing-field", "truncated-away", "broken-json", False}


def test_a_cache_by_several_processes_is_the_same_file_by_file(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", mixed_rows(CHUNK + 30))
    several = precompute_into(tmp_path / "several", model_dir, data, block_pairs=64)
    monkeypatch.setattr(workers, "cores", lambda: 1)
    assert_same_store(precompute_into(tmp_path / "one", model_dir, data, block_pairs=64), several)


def numbered(count: int) -> Iterator[Row]:
    yield from enumerate(make_rows(count), start=1)


def test_only_so_many_rows_are_read_ahead(encoder: RowEncoder) -> None:
    read = 0

    def counted() -> Iterator[Row]:
        nonlocal read
        for row in numbered(20 * CHUNK):
            read += 1
            yield row

    items = encoder.encode_by_all_cores(counted())
    for taken in range(12 * CHUNK):
        next(items)
        assert read <= taken + (2 * workers.AHEAD + 2) * CHUNK
    assert read < 20 * CHUNK
    items.close()


def test_what_is_wrong_with_a_file_is_told_after_the_rows_before_it(encoder: RowEncoder) -> None:
    def broken() -> Iterator[Row]:
        yield from numbered(4 * CHUNK)
        raise DataError("pairs.jsonl: cannot be read after 512 rows")

    items, found = encoder.encode_by_all_cores(broken()), []
    with pytest.raises(DataError, match="after 512 rows"):
        for item in items:
            found.append(item)
    assert len(found) == 4 * CHUNK


def test_an_error_in_a_worker_is_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template that cannot be compiled."""
    Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = replace(ChatTokenizer.load(tmp_path), template="{% if %}")
    encoder = RowEncoder(Encoder(tokenizer, 40), "pairs.jsonl", Reading(), 0)
    monkeypatch.setattr(workers, "ALONE", 0)
    with pytest.raises(ConfigError, match="the chat template cannot be compiled"):
        list(encoder.encode_by_all_cores(numbered(CHUNK)))


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_worker_that_dies_is_one_line(encoder: RowEncoder) -> None:
    before, items = set(children_of(os.getpid())), encoder.encode_by_all_cores(numbered(30 * CHUNK))
    for _ in range(CHUNK + 1):
        next(items)
    (killed, _) = set(children_of(os.getpid())) - before
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(OutputError, match=r"has died \(exit code -9\); expected memory") as caught:
        list(items)
    assert "\n" not in str(caught.value)
    assert set(children_of(os.getpid())) <= before


PARENT = """
import signal
import sys
from pathlib import Path
from minicache.data import workers
from minicache.data.columns import Reading
from minicache.data.encode import Encoder
from minicache.data.tokenizers import ChatTokenizer
from minicache.processes.signals import Interruptible
from tests.conftest import make_rows
# a shell's background job, in which the tests may run, ignores it
signal.signal(signal.SIGINT, signal.default_int_handler)
workers.ALONE, workers.cores = 0, lambda: 2
encoder = workers.RowEncoder(Encoder(ChatTokenizer.load(Path(sys.argv[1])), 40), "f", Reading(), 0)
rows = make_rows(200)
def endless():
    while True:
        yield from enumerate(rows, start=1)
try:
    with Interruptible():
        for number, _ in enumerate(encoder.encode_by_all_cores(endless())):
            if number == 300:
                print("going", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(
    tokenizer_dir: Path, kind: signal.Signals, wait_for_end: Callable[[list[int]], None]
) -> None:
    """Signals go to the whole group, as a terminal and a scheduler send them."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tokenizer_dir)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert parent.stdout and parent.stdout.readline() == "going\n"
    children = children_of(parent.pid)
    assert len(children) == 2
    for process in {parent.pid, *children} if kind == signal.SIGTERM else {parent.pid}:
        os.kill(process, kind)
    said, complaints = parent.communicate(timeout=30)
    assert (said, complaints) == ("" if kind == signal.SIGKILL else "interrupted\n", "")
    wait_for_end(children)


@pytest.fixture
def wait_for_end() -> Callable[[list[int]], None]:
    def wait(processes: list[int]) -> None:
        deadline = time.monotonic() + 20
        while running := [process for process in processes if Path(f"/proc/{process}").exists()]:
            assert time.monotonic() < deadline, running
            time.sleep(0.05)

    return wait


def test_rows_that_are_refused_survive_the_way(encoder: RowEncoder) -> None:
    refusal = RowRefused("broken-json", "not JSON: line 3")
    refusal.line = 3
    again = pickle.loads(pickle.dumps(refusal))
    assert (again.reason, str(again), again.line) == ("broken-json", "not JSON: line 3", 3)
