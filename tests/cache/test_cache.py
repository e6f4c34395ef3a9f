"""The store: what is written comes back; every kind of damage is found and named; a crash leaves a block undone."""

import errno
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zarr.storage import LocalStore

from minicache.cache import schema
from minicache.cache.identity import FORMAT_VERSION, Identity, digest_of
from minicache.cache.manifest import Log, Manifest, Source
from minicache.cache.places import directory as places
from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import RefBlock, array_specs
from minicache.cache.writer import CacheWriter
from minicache.disk import flush_to_disk
from minicache.errors import (
    CacheDamaged,
    CacheError,
    CacheIncomplete,
    CacheMismatch,
    CacheNotFound,
    MinicacheError,
    OutputError,
    StoreError,
)
from minicache.pairs import EncodedPair, PairTable
from tests.helpers.stores import chunk_files

IDENTITY = Identity(
    format_version=FORMAT_VERSION, weights="w", family="llama", tokenizer="t", template="p", vocabulary=400, max_length=32,
    truncate="right", loss_on="response", think="keep", dtype="float32", attention="sdpa", block_pairs=4, per_token=True,
)  # fmt: skip


def random_table(count: int, seed: int, vocabulary: int = 400) -> PairTable:
    random = np.random.default_rng(seed)
    pairs = []
    for line in range(count):
        prefix = random.integers(0, vocabulary, random.integers(1, 8))
        sides: list[np.ndarray] = []
        for _ in range(2):
            rest = random.integers(0, vocabulary, random.integers(1, 20))
            ids = np.concatenate([prefix, rest]).astype(np.int32)
            sides += [ids, (np.arange(len(ids)) >= len(prefix)).astype(np.uint8)]
        pairs.append(EncodedPair.join(sides[0], sides[1], sides[2], sides[3], source=(0, 10 * seed + line + 1)))
    return PairTable.from_pairs(pairs, "uint16" if vocabulary <= 65535 else "int32")


def scores_of(table: PairTable, seed: int) -> RefBlock:
    random = np.random.default_rng(seed)
    per_token = np.where(table.loss_mask == 1, -random.random(len(table.tokens)), np.nan).astype(np.float32)
    return RefBlock(-random.random((len(table), 2)).astype(np.float32), table.token_counts, per_token)


def build(
    path: Path | str, identity: Identity = IDENTITY, sizes: tuple[int, ...] = (4, 4, 3)
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


def undone(path: Path) -> set[tuple[str, int]]:
    """What of which block is missing or damaged."""
    blocks = ReferenceCache(path).blocks
    parts = (("pairs", blocks.pairs), ("ref", blocks.ref))
    return {
        (what, block) for what, read in parts for block, found in blocks.each(read) if isinstance(found, CacheError)
    }


@pytest.mark.parametrize("vocabulary", [400, 65535, 65536, 150_000])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("max_chunk", [2**20, 16])  # a row of tokens is one chunk, or several
def test_what_is_written_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: int, per_token: bool, max_chunk: int
) -> None:
    monkeypatch.setattr(schema, "MAX_CHUNK", max_chunk)
    identity = replace(IDENTITY, vocabulary=vocabulary, per_token=per_token)
    written = build(tmp_path / "cache", identity)
    assert (len(list((tmp_path / "cache/pairs/tokens/c/0").iterdir())) > 1) == (max_chunk == 16)
    table, scores = ReferenceCache(tmp_path / "cache").load()
    expected = PairTable.concatenate([block for block, _ in written])
    for column in ("tokens", "loss_mask", "lengths", "digest", "source"):
        assert np.array_equal(getattr(table, column), getattr(expected, column)), column
        assert getattr(table, column).dtype == getattr(expected, column).dtype
    assert np.array_equal(scores.logp_mean, np.concatenate([block.logp_mean for _, block in written]))
    if per_token:
        kept = [block.token_logps for _, block in written if block.token_logps is not None]
        per_token_logps = np.concatenate(kept)
        assert scores.token_logps is not None
        assert np.array_equal(scores.token_logps, per_token_logps, equal_nan=True)
    assert not list(ReferenceCache(tmp_path / "cache").verify())


@pytest.mark.parametrize("vocabulary", [65535, 65536])
def test_the_largest_token_id_is_no_hole(tmp_path: Path, vocabulary: int) -> None:
    identity, log = replace(IDENTITY, vocabulary=vocabulary), Log("m", "d", {}, [Source("a.jsonl", 1, "x")])
    cache = CacheWriter.create(tmp_path / "cache", Manifest(identity, log), lambda place: place.mkdir())
    ids, mask = np.full(3, vocabulary - 1, np.int32), np.array([0, 1, 1], np.uint8)
    table = PairTable.from_pairs([EncodedPair.join(ids, mask, ids[:2], mask[:2], (0, 1))], identity.token_dtype)
    cache.grow(1)
    cache.write_pairs(0, table)
    assert ReferenceCache(tmp_path / "cache").blocks.pairs(0).tokens.tolist() == table.tokens.tolist()


def test_a_chunk_of_token_logprobs_that_are_all_nan_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zarr does not store a chunk that equals the fill value: a stretch of tokens of which none counts."""
    monkeypatch.setattr(schema, "MAX_CHUNK", 16)
    build(tmp_path / "cache")
    cache = CacheWriter(tmp_path / "cache")
    scores = cache.blocks.ref(1)
    assert scores.token_logps is not None
    scores.token_logps[-(len(scores.token_logps) % 16 or 16) :] = np.nan
    cache.write_ref(1, scores)
    assert len(list((tmp_path / "cache/ref/token_logps/c/1").iterdir())) == len(scores.token_logps) // 16
    again = ReferenceCache(tmp_path / "cache").blocks.ref(1).token_logps
    assert again is not None and np.array_equal(again, scores.token_logps, equal_nan=True)


def test_pairs_are_found_by_position(store: Path) -> None:
    cache = ReferenceCache(store)
    table, scores = cache.load()
    for index in range(11):
        pair, logps = cache.blocks.pair(index)
        assert logps is not None
        assert pair.digest == table[index].digest and np.array_equal(logps, scores.logp_mean[index])
    with pytest.raises(CacheError, match="no pair 11; the cache holds 11"):
        cache.blocks.pair(11)


def test_each_block_or_why_it_cannot_be_read(store: Path) -> None:
    flip(store / "pairs/tokens/c/0/0")
    shutil.rmtree(store / "ledger/pairs/c/1")
    blocks = ReferenceCache(store).blocks
    found = dict(blocks.each(blocks.pairs))
    assert [type(each) for each in found.values()] == [CacheDamaged, CacheIncomplete, PairTable]
    assert [block for block, _ in blocks.each(blocks.ref, [2, 0])] == [2, 0] and blocks.unscored() == [1]
    assert list(blocks.spans()) == [(0, range(4))], "no position behind block 1 is known"
    with pytest.raises(CacheIncomplete, match="block 1 is missing"):
        blocks.pair(9)

    def away(block: int) -> None:
        raise StoreError("the network is away")

    with pytest.raises(StoreError):
        next(blocks.each(away))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
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
        assert problems and all(array in line and f"block {block}" in line for line in problems), (relative, problems)
        with pytest.raises((CacheDamaged, CacheIncomplete), match=f"{array}.*, block {block}.*precompute-ref again"):
            ReferenceCache(store).load()


IMPOSSIBLE: dict[str, tuple[Callable[[PairTable, RefBlock], object], str]] = {
    "an id below 0": (lambda table, ref: table.tokens.__setitem__(3, -2), "ids from 0 to 99999"),
    "an id beyond the vocabulary": (lambda table, ref: table.tokens.__setitem__(3, 10**5), "ids from 0 to 99999"),
    "a mask of 2": (lambda table, ref: table.loss_mask.__setitem__(0, 2), "a mask of 0 and 1"),
    "no answer": (lambda table, ref: table.lengths.__setitem__(0, (len(table[0].tokens), 0, 0)), "of 1 to 32 on each"),
    "a prompt of 2^31": (
        lambda table, ref: table.lengths.__setitem__(0, (2**31 - 1, len(table[0].tokens) - 2**31, 1)),
        "of 1 to 32 on each",
    ),
    "a file that is not in the log": (lambda table, ref: table.source.__setitem__(0, (9, 1)), "pairs of the 1 files"),
    "a file from the end": (lambda table, ref: table.source.__setitem__(0, (-2, 1)), "pairs of the 1 files"),
    "no logprob": (lambda table, ref: ref.logp_mean.__setitem__(0, np.inf), "finite logprobs"),
    "no token": (lambda table, ref: ref.token_count.__setitem__(0, 0), "of at least one token a side"),
    "other counts": (lambda table, ref: ref.token_count.__setitem__(0, 99), "as many tokens in ref/token_count"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_values_that_no_pair_can_have_are_refused_though_they_fit_their_ledger(tmp_path: Path, case: str) -> None:
    """Whoever writes a cache can write its ledger too."""
    change, said = IMPOSSIBLE[case]
    identity = replace(IDENTITY, vocabulary=10**5)
    build(tmp_path / "cache", identity)
    cache = CacheWriter(tmp_path / "cache")
    table, ref = cache.blocks.whole(1)
    table = replace(table, **{item.name: getattr(table, item.name).copy() for item in fields(table)})
    ref = replace(ref, **{item.name: getattr(ref, item.name).copy() for item in fields(ref)})
    change(table, ref)
    cache.write_pairs(1, table)
    # `write_ref` itself refuses what is not finite
    row = schema.ref_row(identity, ref, cache._arrays.row("ledger/pairs", 1))
    cache._commit("ledger/ref", 1, row, {f"ref/{item.name}": getattr(ref, item.name) for item in fields(ref)})
    reader = ReferenceCache(tmp_path / "cache")
    with pytest.raises(CacheDamaged, match=rf"block 1 holds what no run of precompute-ref writes; expected .*{said}"):
        reader.load()
    ((_, problem),) = list(reader.verify())
    assert "block 1 holds" in str(problem)


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_chunk_of_a_row_of_several_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(schema, "MAX_CHUNK", 16)
    build(tmp_path / "cache")
    for array in ("pairs/tokens", "pairs/loss_mask", "ref/token_logps"):
        for chunk in sorted((tmp_path / "cache" / array / "c" / "1").iterdir()):
            sound = chunk.read_bytes()
            DAMAGE[damage](chunk)
            with pytest.raises(CacheDamaged, match=f"{array}.*, block 1"):
                ReferenceCache(tmp_path / "cache").load()
            chunk.write_bytes(sound)
    assert not list(ReferenceCache(tmp_path / "cache").verify())


def test_a_disk_that_cannot_be_read_is_named_like_damage(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, original = ReferenceCache(store), LocalStore.get

    async def failing(self: LocalStore, key: str, *arguments: Any, **options: Any) -> Any:
        if key.startswith("pairs/digest/c/2/"):
            raise OSError(errno.EIO, "Input/output error")
        return await original(self, key, *arguments, **options)

    monkeypatch.setattr(LocalStore, "get", failing)
    with pytest.raises(CacheDamaged, match=r"pairs/digest, block 2: .*Input/output error"):
        cache.load()


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
    with pytest.raises(CacheDamaged, match=r"ref/logp_mean.*, block 1: the data does not fit"):
        ReferenceCache(store).blocks.ref(1)


def edit(store: Path, change: Callable[[Any], object], name: str = "zarr.json") -> None:
    content = json.loads((store / name).read_text())
    change(content)
    (store / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m["identity"].update(max_length=64), CacheDamaged, "changed after it was written"),
        (lambda m: m["log"].update(pairs=12), CacheDamaged, "changed after it was written"),
        (lambda m: m["log"].clear(), CacheDamaged, "changed after it was written"),
        (lambda m: m.pop("log"), CacheDamaged, "changed after it was written"),
        (lambda m: m.pop("digest"), CacheDamaged, "changed after it was written"),
        (lambda m: m["identity"].update(format_version=9), CacheMismatch, "cache format 9, this program reads 1"),
        (lambda m: m.pop("identity"), CacheDamaged, "without a minicache manifest"),
        (lambda m: m.clear(), CacheDamaged, "without a minicache manifest"),
    ],
)
def test_an_edited_manifest_is_refused(
    store: Path, change: Callable[[dict[str, Any]], object], error: type[CacheError], message: str
) -> None:
    edit(store, lambda content: change(content["attributes"]["minicache"]))
    with pytest.raises(error, match=message):
        ReferenceCache(store)


def test_a_manifest_with_an_unknown_field_is_of_another_version(store: Path) -> None:
    def add_field(content: dict[str, Any]) -> None:
        manifest = content["attributes"]["minicache"]
        manifest["log"]["mood"] = "good"
        manifest["digest"] = digest_of({"identity": manifest["identity"], "log": manifest["log"]})

    edit(store, add_field)
    with pytest.raises(CacheMismatch, match=r"another version of this program: .*mood"):
        ReferenceCache(store)


@pytest.mark.parametrize("name", [field.name for field in fields(Identity)])
def test_every_field_of_an_identity_is_compared_and_named(name: str) -> None:
    said = ("here", ("found", "asked for"), "Ask for the same")
    IDENTITY.require(replace(IDENTITY), *said)
    value = getattr(IDENTITY, name)
    changed: dict[str, Any] = {name: f"{value}x" if isinstance(value, str) else value + 1}
    other = replace(IDENTITY, **changed)
    assert other.digest != IDENTITY.digest
    with pytest.raises(
        CacheMismatch, match=rf"here: {name} is {'none' if value == '' else value}, asked for {getattr(other, name)}\. "
    ):
        IDENTITY.require(other, *said)


def test_a_file_name_may_hold_any_bytes(store: Path) -> None:
    cache = CacheWriter(store)
    cache.log.sources[0].name = "数据 \udce9.jsonl"
    cache.write_log()
    assert ReferenceCache(store).log == cache.log


@pytest.mark.parametrize("name", ["zarr.json", "pairs/lengths/zarr.json", "ref/logp_mean/zarr.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b'{"zarr_format": 3}', b'{"zarr_format": 3, "node_type": "group"}']
)
def test_damaged_metadata_is_refused_by_name(store: Path, name: str, content: bytes) -> None:
    (store / name).write_bytes(content)
    with pytest.raises(CacheDamaged, match=name.removesuffix("/zarr.json")):
        ReferenceCache(store)


@pytest.mark.parametrize(
    "change",
    [
        {"data_type": "float32"},
        {"data_type": "uint32"},
        {"fill_value": 0},
        {"fill_value": 1e300},
        {"shape": [3, 5, 3]},
        {"shape": [2, 4, 3]},
        {"shape": []},
    ],
)
def test_edited_array_metadata_is_refused(store: Path, change: dict[str, Any]) -> None:
    edit(store, lambda content: content.update(change), "pairs/lengths/zarr.json")
    with pytest.raises(CacheDamaged, match="pairs/lengths"):
        ReferenceCache(store)


def test_whatever_is_done_to_metadata_the_values_are_the_same_or_refused(store: Path) -> None:
    """zarr keeps no checksum of a zarr.json: bytes at random places are replaced, cut off, or taken out."""
    chance, files = random.Random(0), sorted(store.rglob("zarr.json"))
    table, scores = ReferenceCache(store).load()
    refused = 0
    for _ in range(150):
        file = chance.choice(files)
        sound = file.read_bytes()
        start = chance.randrange(len(sound))
        stop = start + chance.choice([1, 1, 1, 2, 10, len(sound)])
        file.write_bytes(sound[:start] + chance.randbytes(chance.choice([0, 1])) + sound[stop:])
        try:
            found, found_scores = ReferenceCache(store).load()
            assert np.array_equal(found.digest, table.digest) and np.array_equal(found.tokens, table.tokens)
            assert np.array_equal(found_scores.logp_mean, scores.logp_mean)
        except MinicacheError:
            refused += 1
        file.write_bytes(sound)
    assert refused > 75


def test_what_is_no_cache_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("absent", "no such directory"),
        ("file", "is a file, no cache"),
        ("empty", "no reference cache"),
    ):
        with pytest.raises(CacheNotFound, match=message):
            ReferenceCache(tmp_path / name)


def test_a_directory_with_other_things_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(OutputError, match="exists and is no reference cache"):
        build(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_a_cache_is_made_where_a_link_leads_but_not_around_oneself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    build(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and not list(ReferenceCache(tmp_path / "real").verify())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="name another --ref-cache"):
        build(Path())


def test_leftovers_of_killed_writers_do_no_harm(store: Path) -> None:
    for place in ("", "pairs", "ref/logp_mean/c/1"):
        (store / place / "0.abc.partial").write_bytes(b"half")
    assert not list(ReferenceCache(store).verify())
    drafts = (".refused.jsonl.123.draft", "refused.tmp")
    for name in drafts:
        (store / name).write_text("half")
    CacheWriter(store).place.remove_leftovers()
    assert not list(store.rglob("*.partial")) and not any((store / name).exists() for name in drafts)


def test_a_file_that_cannot_be_written_whole_leaves_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(store.iterdir())

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        CacheWriter(store).place.write("refused.jsonl", b"{}")
    assert sorted(store.iterdir()) == before


def test_a_cache_can_be_read_where_nothing_can_be_written(store: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*")}
    ReferenceCache(store).load()
    assert {file: file.stat().st_mtime_ns for file in store.rglob("*")} == before
    with pytest.raises(ValueError, match="read-only"):
        ReferenceCache(store).blocks.arrays.by_name["ref/logp_mean"][0] = 0.0


class Killed(Exception):
    """Stands for a SIGKILL; real ones are in test_crash.py."""


def fail_at_step(monkeypatch: pytest.MonkeyPatch, step: int, error: Exception) -> list[str]:
    """From now on write or flush number `step`, from 0, fails with `error`, and so do all after it; returns those done before."""
    done: list[str] = []
    set_, delete, flush = LocalStore.set, LocalStore.delete, flush_to_disk

    def note(what: str) -> None:
        if len(done) >= step:
            raise error
        done.append(what)

    async def failing_set(self: LocalStore, key: str, value: Any) -> None:
        note(key)
        await set_(self, key, value)

    async def failing_delete(self: LocalStore, key: str) -> None:
        note(key)
        await delete(self, key)

    def failing_flush(files: Any) -> None:
        note("flush")
        flush(files)

    monkeypatch.setattr(LocalStore, "set", failing_set)
    monkeypatch.setattr(LocalStore, "delete", failing_delete)
    monkeypatch.setattr(places, "flush_to_disk", failing_flush)
    return done


def every_step(action: Callable[[], object], error: Exception) -> Any:
    """Call `action` again and again, each time failing one step later, until it goes through; yields after each failure."""
    for step in range(1000):
        with pytest.MonkeyPatch.context() as patch:
            done = fail_at_step(patch, step, error)
            try:
                action()
                return
            except (Killed, OutputError):
                assert len(done) == step
        yield step


def other_files(store: Path, block: int) -> dict[str, bytes]:
    """Chunks of all blocks but this."""
    return {
        str(file): file.read_bytes() for file in chunk_files(store) if file.relative_to(store).parts[3] != str(block)
    }


@pytest.mark.parametrize("what", ["pairs", "ref"])
def test_a_crash_at_any_step_leaves_the_block_undone_and_the_rest_alone(store: Path, what: str) -> None:
    table = random_table(4, seed=7)
    cache = CacheWriter(store)
    cache.grow(4)
    if what == "ref":
        cache.write_pairs(3, table)
    before, before_undone = other_files(store, 3), undone(store)
    assert (what, 3) in before_undone
    write = {"pairs": lambda: cache.write_pairs(3, table), "ref": lambda: cache.write_ref(3, scores_of(table, 7))}[what]
    steps = 0
    for _ in every_step(write, Killed()):
        steps += 1
        if not (store / "ledger" / what / "c" / "3").exists():  # the last step of all is to flush the ledger's row
            assert undone(store) == before_undone
        assert other_files(store, 3) == before
        shutil.rmtree(store / "ledger" / what / "c" / "3", ignore_errors=True)
    assert steps > 4 and (what, 3) not in undone(store) and other_files(store, 3) == before


@pytest.mark.parametrize("what", ["pairs", "ref"])
def test_the_ledger_is_written_after_the_data_has_reached_the_disk(
    store: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    cache, table = CacheWriter(store), random_table(4, seed=7)
    cache.grow(4)
    cache.write_pairs(3, table)
    with monkeypatch.context() as patch:
        done = fail_at_step(patch, 1000, Killed())
        cache.write_pairs(3, table) if what == "pairs" else cache.write_ref(3, scores_of(table, 7))
    assert done[-3:] == ["flush", f"ledger/{what}/c/3/0", "flush"]
    assert all(key.startswith(f"{what}/") for key in done[:-3])


def test_a_crash_while_a_block_is_redone_with_other_data_shows(store: Path) -> None:
    """The old ledger row is still there; it does not fit what lies beside it."""
    cache = CacheWriter(store)
    row = (store / "ledger/pairs/c/1/0").read_bytes()
    for step in every_step(lambda: cache.write_pairs(1, random_table(4, seed=99)), Killed()):
        if (store / "ledger/pairs/c/1/0").read_bytes() == row:
            assert (("pairs", 1) in undone(store)) == (step > 0)
    assert undone(store) == {("ref", 1)}  # scores of other pairs


def test_a_cache_grows_and_shrinks_and_a_crash_at_any_step_of_it_costs_nothing(store: Path) -> None:
    before, log = {file: file.read_bytes() for file in chunk_files(store)}, ReferenceCache(store).log
    for blocks, grow in ((5, True), (3, False)):

        def change(blocks: int = blocks, grow: bool = grow) -> None:
            writer = CacheWriter(store)
            (writer.grow if grow else writer.shrink)(blocks)

        for _ in every_step(change, Killed()):
            assert undone(store) <= {(what, block) for what in ("pairs", "ref") for block in (3, 4)}
        assert len(ReferenceCache(store).blocks) == blocks
    assert {file: file.read_bytes() for file in chunk_files(store)} == before
    CacheWriter(store).grow(2)
    CacheWriter(store).shrink(7)
    assert len(ReferenceCache(store).blocks) == 3 and ReferenceCache(store).log == log


def test_shrinking_takes_the_blocks_away(store: Path) -> None:
    CacheWriter(store).shrink(1)
    assert {file.relative_to(store).parts[3] for file in chunk_files(store)} == {"0"}
    with pytest.raises(CacheDamaged, match="3 blocks were written, the arrays hold 1"):
        ReferenceCache(store).load()


def test_a_full_disk_is_one_line_and_costs_no_finished_block(store: Path) -> None:
    table, full = random_table(4, seed=7), OSError(errno.ENOSPC, "No space left on device")

    def add_block() -> None:
        cache = CacheWriter(store)
        cache.grow(4)
        cache.write_pairs(3, table)
        cache.write_ref(3, scores_of(table, 7))

    before = other_files(store, 3)
    for _ in every_step(add_block, full):
        assert other_files(store, 3) == before
        assert undone(store) <= {("pairs", 3), ("ref", 3)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutputError, match="disk is full; free some space"):
        fail_at_step(patch, 0, full)
        CacheWriter(store).write_log()
    assert undone(store) == set() and len(ReferenceCache(store).blocks) == 4


def test_creating_fails_whole_or_not_at_all(tmp_path: Path) -> None:
    def create() -> None:
        CacheWriter.create(tmp_path / "cache", Manifest(IDENTITY, Log("m", "d", {})), lambda place: place.mkdir())

    (tmp_path / ".cache.creating-0" / "pairs").mkdir(parents=True)  # what a kill leaves
    for _ in every_step(create, OSError(errno.ENOSPC, "No space left on device")):
        assert not (tmp_path / "cache").exists()
    assert not (tmp_path / ".cache.creating-0").exists()
    assert len(ReferenceCache(tmp_path / "cache").blocks) == 0
