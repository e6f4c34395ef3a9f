"""What a place of caches does, in a directory as in an object store: in memory and on an S3 server on loopback."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from minicache.cache.places import bounded, leases
from minicache.cache.places.bucket import bucket_at
from minicache.cache.places.claims import CLAIM_FILE, Claim
from minicache.cache.places.hub import snapshot_at
from minicache.cache.places.opening import claimed, place_at
from minicache.cache.places.place import ROOT, Place
from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheDamaged, CacheNotFound, OutputError
from minicache.options.where import Where
from tests.cache.test_cache import build
from tests.helpers.hub_repos import Hub
from tests.helpers.object_stores import downloaded, set_times
from tests.helpers.stores import contents

KINDS = ["directory", "memory", "s3"]
NUMBERS = count()


@pytest.fixture(params=KINDS)
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Where]:
    """A path or URL where nothing is yet."""
    set_times(monkeypatch)
    if request.param == "directory":
        yield tmp_path / "cache"
    elif request.param == "memory":
        yield f"memory://{next(NUMBERS)}"
    else:
        yield request.getfixturevalue("url")
    bucket_at.cache_clear()


@pytest.fixture
def place(where: Where) -> Place:
    return place_at(where)


@pytest.fixture
def cache(where: Where) -> Place:
    """A place with a cache."""
    build(where)
    return place_at(where)


def draft_in(folder: Path) -> Path:
    draft = folder / "draft"
    for name, content in {
        ROOT: b"{}",
        "pairs/zarr.json": b"p",
        "tokenizer/source/vocab": b"v",
        CLAIM_FILE: b"",
    }.items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / name).write_bytes(content)
    return draft


# --- single files ---


def test_files_are_written_read_replaced_and_measured(cache: Place) -> None:
    assert not cache.has("refused.jsonl") and cache.read("refused.jsonl") is None
    with pytest.raises(FileNotFoundError):
        cache.size("refused.jsonl")
    for content in (b"first", b"", bytes(range(256)) * 100, "世界\n".encode()):
        cache.write("refused.jsonl", content)
        assert cache.has("refused.jsonl") and cache.size("refused.jsonl") == len(content)
        assert cache.read("refused.jsonl") == content
    assert str(cache.locate("refused.jsonl")).endswith("/refused.jsonl")
    assert str(cache.locate("x")).startswith(str(cache.where))


def test_a_folder_is_no_file(cache: Place) -> None:
    assert not cache.has("pairs") and cache.read("pairs/tokens") is None


def test_folders_are_replaced_whole(cache: Place, tmp_path: Path) -> None:
    assert not list(cache.folder("tokenizer").glob("*")) and not cache.folder("none").exists()
    for names in ({"a", "b/c"}, {"b/c", "d"}):
        new = tmp_path / f"new-{len(names)}-{min(names)}-{max(names)}".replace("/", "_")
        for name in names:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(name)
        cache.put_folder("tokenizer", new)
        found = cache.folder("tokenizer")
        files = {file.relative_to(found).as_posix(): file.read_text() for file in found.rglob("*") if file.is_file()}
        assert files == {name: name for name in names}


def test_the_size_of_all_is_that_of_the_files(cache: Place, tmp_path: Path) -> None:
    before = cache.total_bytes()
    cache.write("refused.jsonl", bytes(1000))
    assert before > 1000 and cache.total_bytes() == before + 1000


def test_flushing_what_is_not_there_is_no_error(cache: Place) -> None:
    """A chunk that holds only fill values is not stored."""
    cache.flush([ROOT, "pairs/tokens/c/99/0"])
    cache.remove_partial(["pairs/tokens/c/99"])
    cache.remove_leftovers()
    assert not list(ReferenceCache(cache.where).verify())


# --- the whole ---


def test_where_nothing_is_there_is_no_cache(place: Place) -> None:
    with pytest.raises(CacheNotFound, match="`minidpo precompute-ref --ref-cache"):
        place.require_cache()
    assert not place.has(ROOT) and place.total_bytes() == 0
    place.require_free()
    place.require_free(is_new=True)


def test_a_draft_appears_whole(place: Place, tmp_path: Path) -> None:
    place.publish(draft_in(tmp_path))
    place.require_cache()
    for name, content in {ROOT: b"{}", "pairs/zarr.json": b"p", "tokenizer/source/vocab": b"v"}.items():
        assert place.read(name) == content
    for is_new in (False, True):
        with pytest.raises(OutputError, match="name another"):
            place.require_free(is_new)
    with suppress(FileExistsError), pytest.raises(OutputError):
        place.publish(draft_in(tmp_path))
    assert place.read(ROOT) == b"{}"


def test_other_things_are_not_written_over(place: Place, tmp_path: Path) -> None:
    if isinstance(place.where, Path):
        place.where.mkdir(parents=True)
        (place.where / "photos").mkdir()
        (place.where / "photos" / "1.jpg").write_bytes(b"!")
    else:
        # what a creation that was killed left may be overwritten
        place.write("pairs/tokens/c/0/0", b"of another")
        place.require_free()
        place.write("photos/1.jpg", b"!")
    for refused in (place.require_free, lambda: place.publish(draft_in(tmp_path)), lambda: build(place.where)):
        with pytest.raises(
            OutputError, match=r"name another --ref-cache|another process has made it meanwhile; name another"
        ):
            refused()
    assert place.read("photos/1.jpg") == b"!" and not place.has(ROOT)


def test_a_removed_cache_is_gone_and_its_place_is_free(cache: Place) -> None:
    cache.remove()
    with pytest.raises(CacheNotFound):
        ReferenceCache(cache.where)
    cache.require_free()
    build(cache.where)
    assert not list(ReferenceCache(cache.where).verify())


def test_all_kinds_hold_the_same_bytes(where: Where, tmp_path: Path) -> None:
    build(tmp_path / "expected")
    build(where)
    here = contents(where) if isinstance(where, Path) else downloaded(where, tmp_path / "copy")
    expected = contents(tmp_path / "expected")
    for files in (here, expected):
        files.pop(CLAIM_FILE, None)
    assert here == expected


# --- zarr ---


def test_a_store_of_zarr_reads_what_it_writes(place: Place) -> None:
    if isinstance(place.where, Path):
        place.where.mkdir(parents=True)
    group = zarr.create_group(place.store(read_only=False))
    array = group.create_array("pairs/x", shape=(4, 3), chunks=(2, 3), dtype="int32", fill_value=-1)
    array[:2] = 7
    found = zarr.open_group(place.store(read_only=True), mode="r", use_consolidated=False)["pairs/x"]
    assert isinstance(found, zarr.Array) and np.asarray(found[:]).tolist() == [[7] * 3] * 2 + [[-1] * 3] * 2
    # a chunk that holds fill values alone, and those beyond a new end, are deleted
    array[:2] = -1
    assert not place.has("pairs/x/c/0/0")
    array[:] = 8
    array.resize((2, 3))
    assert place.has("pairs/x/c/0/0") and not place.has("pairs/x/c/1/0")
    with pytest.raises(ValueError, match="read-only"):
        zarr.open_group(place.store(read_only=True), mode="r").create_array("y", shape=(1,), dtype="int8")


# --- what is too large ---


def test_what_is_larger_than_any_file_of_a_cache_is_not_read(cache: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store, name, size = cache.store(read_only=True), "ref/logp_mean/c/1/0/0", cache.size("ref/logp_mean/c/1/0/0")
    monkeypatch.setattr(bounded, "MOST_BYTES", size)
    chunk = sync(store.get(name, default_buffer_prototype()))
    assert chunk is not None and chunk.to_bytes() == cache.read(name)
    monkeypatch.setattr(bounded, "MOST_BYTES", size - 1)
    with pytest.raises(ValueError, match=f"^{size} bytes, expected {size - 1} or fewer"):
        sync(store.get(name, default_buffer_prototype()))
    cache.write("refused.jsonl", bytes(1000))
    monkeypatch.setattr(bounded, "MOST_IN_A_LIST", 999)
    with pytest.raises(CacheDamaged, match=r"refused\.jsonl: .*1,000 bytes, expected 999 or fewer"):
        cache.read("refused.jsonl")


# --- claims ---


@pytest.fixture
def claims(cache: Place) -> Iterator[Callable[[], Claim]]:
    """Makes claims of one name, released at the end."""
    made: list[Claim] = []

    def make() -> Claim:
        made.append(cache.claim(CLAIM_FILE))
        return made[-1]

    yield make
    for each in made:
        each.release()


def test_a_claim_is_taken_alone_or_together(claims: Callable[[], Claim]) -> None:
    first, second, third = claims(), claims(), claims()
    assert first.is_safe and first.take(alone=True) and first.take(alone=True)
    assert not second.take(alone=True) and not second.take(alone=False)
    # from alone to shared, and back as soon as nobody else holds it
    assert first.take(alone=False) and second.take(alone=False)
    second.release()
    assert first.take(alone=True) and not third.take(alone=False)
    first.release()
    first.release()
    assert third.take(alone=True)


def test_a_removed_claim_leaves_nothing(cache: Place) -> None:
    claim = cache.claim("shard-1-of-2.claim")
    assert claim.take(alone=True)
    claim.remove()
    assert not cache.has("shard-1-of-2.claim")


def test_two_claims_of_other_names_do_not_exclude_each_other(cache: Place) -> None:
    first, second = cache.claim("shard-1-of-2.claim"), cache.claim("shard-2-of-2.claim")
    assert first.take(alone=True) and second.take(alone=True)
    first.remove()
    second.remove()


def test_while_one_writes_others_are_refused_in_one_line(cache: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, lease=3.0) if isinstance(cache.where, Path) else monkeypatch.setattr(
        leases, "LEASE_SECONDS", 3.0
    )
    with claimed(cache.where):
        with (
            pytest.raises(
                OutputError, match="another precompute-ref is writing into this cache; wait for its end"
            ) as told,
            claimed(cache.where),
        ):
            pass
        ReferenceCache(cache.where).load()  # reading is always allowed
        cache.write("refused.jsonl", b"of the holder")
    assert "\n" not in str(told.value)
    with claimed(cache.where):
        assert cache.read("refused.jsonl") == b"of the holder"


# --- a place that can only be read ---


def test_a_data_set_of_the_hub_reads_alike_and_refuses_all_else(repos: Hub, tmp_path: Path) -> None:
    build(tmp_path / "cache")
    here = place_at(tmp_path / "cache")
    here.write("tokenizer/tokenizer.json", b"{}")
    files = {name: (tmp_path / "cache" / name).read_bytes() for name in contents(tmp_path / "cache")}
    repos.add("dataset", "org/name", files)
    there = snapshot_at("hf://datasets/org/name")
    there.require_cache()
    for name in (ROOT, "pairs/tokens/c/0/0", "none", "pairs"):
        assert there.has(name) == here.has(name) and there.read(name) == here.read(name)
    assert there.size(ROOT) == here.size(ROOT)
    assert (there.folder("tokenizer") / "tokenizer.json").read_bytes() == b"{}" and not there.folder("none").exists()
    assert not list(ReferenceCache(there.where).verify())
    refused: list[Callable[[], object]] = [
        there.require_free,
        there.remove,
        there.remove_leftovers,
        lambda: there.publish(tmp_path),
        lambda: there.store(read_only=False),
        lambda: there.claim(CLAIM_FILE),
        lambda: there.remove_partial(["pairs"]),
        lambda: there.write("x", b""),
        lambda: there.put_folder("x", tmp_path),
    ]
    for call in refused:
        with pytest.raises(OutputError, match="is read only; make the cache elsewhere"):
            call()
