"""The store: what is written comes back; every kind of damage is found and named; a crash leaves a block undone."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from zarr.storage import LocalStore

from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import FORMAT_VERSION, Identity, Log, Manifest, RefBlock, Source, array_specs
from minicache.cache.writer import CacheWriter
from minicache.errors import CacheDamaged, CacheError, CacheIncomplete, CacheMismatch, CacheNotFound, OutputError
from minicache.pairs import EncodedPair, PairTable
from tests.stores import chunk_files

IDENTITY = Identity(
    format_version=FORMAT_VERSION, weights="w", family="llama", tokenizer="t", template="p", vocabulary=400, max_length=32,
    truncate="right", loss_on="response", dtype="float32", attention="sdpa", block_pairs=4, per_token=True,
)  # fmt: skip


def random_table(count: int, seed: int, vocabulary: int = 400) -> PairTable:
    random = np.random.default_rng(seed)
    pairs = []
    for line in range(count):
        prefix = random.integers(0, vocabulary, random.integers(1, 8))
        sides = []
        for _ in range(2):
            rest = random.integers(0, vocabulary, random.integers(1, 20))
            ids = np.concatenate([prefix, rest]).astype(np.int32)
            sides += [ids, (np.arange(len(ids)) >= len(prefix)).astype(np.uint8)]
        pairs.append(EncodedPair.join(*sides, source=(0, 10 * seed + line + 1)))
    return PairTable.from_pairs(pairs, "uint16" if vocabulary <= 65535 else "int32")


def scores_of(table: PairTable, seed: int) -> RefBlock:
    random = np.random.default_rng(seed)
    per_token = np.where(table.loss_mask == 1, -random.random(len(table.tokens)), np.nan).astype(np.float32)
    return RefBlock(-random.random((len(table), 2)).astype(np.float32), table.token_counts, per_token)


def build(
    path: Path, identity: Identity = IDENTITY, sizes: tuple[int, ...] = (4, 4, 3)
) -> list[tuple[PairTable, RefBlock]]:
    log = Log("model", "2026-01-01", {}, [Source("a.jsonl", 1, "x", complete=True)], len(sizes), sum(sizes))
    cache = CacheWriter.create(path, Manifest(identity, log), lambda place: place.mkdir())
    cache.grow(len(sizes))
    written = []
    for block, size in enumerate(sizes):
        table = random_table(size, block, identity.vocabulary)
        written.append((table, scores_of(table, block)))
        cache.write_pairs(block, table)
        cache.write_ref(block, written[-1][1])
    return written


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "cache"
    build(path)
    return path


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "cache")


@pytest.mark.parametrize("vocabulary", [400, 65535, 65536, 150_000])
@pytest.mark.parametrize("per_token", [True, False])
def test_what_is_written_comes_back(tmp_path: Path, vocabulary: int, per_token: bool) -> None:
    identity = replace(IDENTITY, vocabulary=vocabulary, per_token=per_token)
    written = build(tmp_path / "cache", identity)
    table, scores = ReferenceCache(tmp_path / "cache").load()
    expected = PairTable.concatenate([block for block, _ in written])
    for column in ("tokens", "loss_mask", "lengths", "digest", "source"):
        assert np.array_equal(getattr(table, column), getattr(expected, column)), column
        assert getattr(table, column).dtype == getattr(expected, column).dtype
    assert np.array_equal(scores.logp_mean, np.concatenate([block.logp_mean for _, block in written]))
    if per_token:
        per_token_logps = np.concatenate([block.token_logps for _, block in written])
        assert np.array_equal(scores.token_logps, per_token_logps, equal_nan=True)
    assert not list(ReferenceCache(tmp_path / "cache").verify())


def test_pairs_are_found_by_position(store: Path) -> None:
    cache = ReferenceCache(store)
    table, scores = cache.load()
    for index in range(11):
        pair, logps = cache.pair(index)
        assert pair.digest == table[index].digest and np.array_equal(logps, scores.logp_mean[index])
    with pytest.raises(CacheError, match="no pair 11; the cache holds 11"):
        cache.pair(11)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "flip": flip,
    "truncate": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "empty": lambda file: file.write_bytes(b""),
    "delete": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damaged_chunk_is_found_and_named(pristine: Path, tmp_path: Path, damage: str) -> None:
    chunks = chunk_files(pristine)
    assert len(chunks) == 3 * len(array_specs(IDENTITY))
    for number, chunk in enumerate(chunks):
        store = shutil.copytree(pristine, tmp_path / str(number))
        relative = chunk.relative_to(pristine)
        DAMAGE[damage](store / relative)
        array, block = "/".join(relative.parts[:2]), int(relative.parts[3])
        problems = [str(problem) for _, problem in ReferenceCache(store).verify()]
        named = [line for line in problems if f"block {block}" in line]
        assert named and named == problems, (relative, problems)
        # an array of token logprobs may hold any NaN, so a lost chunk of it shows in its group's digest
        assert any(array in line or (array == "ref/token_logps" and "ref/*" in line) for line in problems), (
            relative,
            problems,
        )
        with pytest.raises((CacheDamaged, CacheIncomplete), match=f"block {block}"):
            ReferenceCache(store).load()


@pytest.mark.parametrize("array", sorted(array_specs(IDENTITY)))
def test_chunks_of_two_blocks_swapped_are_found(store: Path, array: str) -> None:
    first, second = [sorted((store / array / "c" / block).rglob("*")) for block in "01"]
    for one, other in zip(first, second, strict=True):
        if one.is_file():
            a, b = one.read_bytes(), other.read_bytes()
            one.write_bytes(b)
            other.write_bytes(a)
    with pytest.raises(CacheDamaged):
        ReferenceCache(store).load()


def test_scores_of_other_pairs_do_not_pass(store: Path) -> None:
    """Pairs rewritten under scores that were made of others: each half fits its own data, but not the other."""
    CacheWriter(store).write_pairs(1, random_table(4, seed=99))
    with pytest.raises(CacheDamaged, match=r"ref/\*, block 1"):
        ReferenceCache(store).ref(1)


def edit(store: Path, change, name: str = "zarr.json") -> None:
    content = json.loads((store / name).read_text())
    change(content)
    (store / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m["identity"].update(max_length=64), CacheDamaged, "changed after it was written"),
        (lambda m: m["log"].update(pairs=12), CacheDamaged, "changed after it was written"),
        (lambda m: m["identity"].update(format_version=9), CacheMismatch, "cache format 9, this program reads 1"),
        (lambda m: m.pop("identity"), CacheDamaged, "without a minicache manifest"),
        (lambda m: m.clear(), CacheDamaged, "without a minicache manifest"),
    ],
)
def test_an_edited_manifest_is_refused(store: Path, change, error, message: str) -> None:
    edit(store, lambda content: change(content["attributes"]["minicache"]))
    with pytest.raises(error, match=message):
        ReferenceCache(store)


@pytest.mark.parametrize("name", ["zarr.json", "pairs/lengths/zarr.json", "ref/logp_mean/zarr.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"zarr_format": 3}'])
def test_damaged_metadata_is_refused_by_name(store: Path, name: str, content: bytes) -> None:
    (store / name).write_bytes(content)
    with pytest.raises(CacheDamaged, match=name.removesuffix("/zarr.json")):
        ReferenceCache(store)


@pytest.mark.parametrize("change", [{"data_type": "float32"}, {"fill_value": 0}, {"shape": [3, 5, 3]}])
def test_edited_array_metadata_is_refused(store: Path, change: dict) -> None:
    edit(store, lambda content: content.update(change), "pairs/lengths/zarr.json")
    with pytest.raises(CacheDamaged, match="pairs/lengths"):
        ReferenceCache(store)


def test_what_is_no_cache_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("absent", "no such directory"),
        ("file", "no such directory"),
        ("empty", "no reference cache"),
    ):
        with pytest.raises(CacheNotFound, match=message):
            ReferenceCache(tmp_path / name)


def test_a_directory_with_other_things_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(OutputError, match="exists and is no reference cache"):
        build(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_leftovers_of_killed_writers_do_no_harm(store: Path) -> None:
    for place in ("", "pairs", "ref/logp_mean/c/1"):
        (store / place / "0.abc.partial").write_bytes(b"half")
    assert not list(ReferenceCache(store).verify())
    CacheWriter(store).remove_leftovers()
    assert not list(store.rglob("*.partial"))


def test_a_cache_can_be_read_where_nothing_can_be_written(store: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*")}
    ReferenceCache(store).load()
    assert {file: file.stat().st_mtime_ns for file in store.rglob("*")} == before
    with pytest.raises(ValueError, match="read-only"):
        ReferenceCache(store).arrays["ref/logp_mean"][0] = 0.0


class Killed(Exception):
    """Stands for a SIGKILL; real ones are in test_crash.py."""


def writes_of_a_block(monkeypatch: pytest.MonkeyPatch, fail_at: int, error: Exception) -> list[str]:
    """From now on the write number `fail_at` to a store fails; the keys written before it."""
    keys: list[str] = []
    original = LocalStore.set

    async def failing(self, key, value):
        if len(keys) == fail_at:
            raise error
        keys.append(key)
        await original(self, key, value)

    monkeypatch.setattr(LocalStore, "set", failing)
    return keys


@pytest.mark.parametrize("fail_at", range(6))
def test_a_crash_at_any_write_leaves_the_block_undone_and_the_rest_alone(
    store: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    cache = CacheWriter(store)
    cache.grow(4)
    table = random_table(4, seed=7)
    with monkeypatch.context() as patch:
        writes_of_a_block(patch, fail_at, Killed())
        with pytest.raises(Killed):
            cache.write_pairs(3, table)
    again = CacheWriter(store)
    assert list(again.unfinished("pairs")) == [3] and list(again.unfinished("ref")) == [3]
    again.write_pairs(3, table)
    assert not again.unfinished("pairs")


@pytest.mark.parametrize("fail_at", range(4))
def test_a_full_disk_is_one_line_and_costs_no_finished_block(
    store: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    cache = CacheWriter(store)
    cache.grow(4)
    table = random_table(4, seed=7)
    cache.write_pairs(3, table)
    with monkeypatch.context() as patch:
        writes_of_a_block(patch, fail_at, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OutputError, match="disk is full"):
            cache.write_ref(3, scores_of(table, 7))
    assert list(CacheWriter(store).unfinished("ref")) == [3]
    CacheWriter(store).write_ref(3, scores_of(table, 7))
    assert not CacheWriter(store).unfinished("ref")


def test_creating_fails_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    with monkeypatch.context() as patch:
        writes_of_a_block(patch, 3, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OutputError, match="disk is full"):
            build(path)
    assert not path.exists()
    build(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
