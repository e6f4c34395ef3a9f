"""Every file of a store damaged in every way: nobody uses it, and stage one mends it to the byte or says one line."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from minicache.cache.identity import digest_of
from tests.cache.test_cache import DAMAGE
from tests.conftest import Cli
from tests.helpers.stores import assert_same_store, chunk_files, contents
from tests.torture.conftest import Orderly, StageOne
from tests.torture.counting import asserted

Commands = tuple[Cli, Orderly, StageOne]


@pytest.fixture
def commands(cli: Cli, orderly: Orderly, stage_one: StageOne) -> Commands:
    return cli, orderly, stage_one


def swaps(cache: Path) -> Iterator[tuple[Path, Path]]:
    """Each array's chunks of two blocks; and of the second block those of two arrays."""
    chunks = [chunk.relative_to(cache) for chunk in chunk_files(cache)]
    for first, second in combinations(chunks, 2):
        arrays, blocks = {first.parts[:2], second.parts[:2]}, [first.parts[3], second.parts[3]]
        if len(arrays) == 1 or blocks == ["1", "1"]:
            yield first, second


def require_noticed_and_mended(cache: Path, sound: Path, commands: Commands, what: object) -> None:
    cli, orderly, stage_one = commands
    code, said, _ = cli("inspect-cache", cache, "--verify")
    assert code == 1 and "✗" in said, f"{what}: --verify saw nothing"
    code, said = orderly("train", "--ref-cache", cache, "--out", cache.with_name("run"))
    assert code == 1 and "precompute-ref" in said and not cache.with_name("run").exists(), (what, said)
    assert stage_one(cache) == (0, ""), what
    assert_same_store(cache, sound)


@pytest.mark.parametrize("damage", [*DAMAGE, "garbage"])
def test_every_chunk(small: tuple[Path, Path], tmp_path: Path, commands: Commands, damage: str) -> None:
    sound = small[0]
    cache = shutil.copytree(sound, tmp_path / "cache")
    figures = asserted(f"each chunk damaged: {damage}")
    for chunk in chunk_files(cache):
        with figures.trial(faults=1):
            if damage == "garbage":
                chunk.write_bytes(bytes(range(256)) * 64)
            else:
                DAMAGE[damage](chunk)
            require_noticed_and_mended(cache, sound, commands, chunk)
    figures.end()


def test_every_two_chunks_swapped(small: tuple[Path, Path], tmp_path: Path, commands: Commands) -> None:
    cache = shutil.copytree(small[0], tmp_path / "cache")
    figures = asserted("two chunks swapped: each two")
    for first, second in swaps(cache):
        a, b = (cache / first).read_bytes(), (cache / second).read_bytes()
        assert a != b
        with figures.trial(faults=1):
            (cache / first).write_bytes(b)
            (cache / second).write_bytes(a)
            require_noticed_and_mended(cache, small[0], commands, (first, second))
    assert figures.trials == 10 * 3 + 45
    figures.end()


def test_all_chunks_of_another_cache_of_the_same_identity(
    small: tuple[Path, Path], tmp_path: Path, commands: Commands
) -> None:
    """Whole blocks that fit their ledger, but hold other pairs than the log says: the pairs' sources are then the file's own."""
    cache = shutil.copytree(small[0], tmp_path / "cache")
    for array in (cache / "ref", cache / "ledger" / "ref"):
        for chunk in chunk_files(cache):
            if chunk.is_relative_to(array) and "/c/0" in str(chunk):
                chunk.write_bytes(Path(str(chunk).replace("/c/0", "/c/1")).read_bytes())
    require_noticed_and_mended(cache, small[0], commands, "scores of block 1 as those of block 0, ledger and all")


# --- metadata ---

DEEP = b'{"zarr_format": 3, "node_type": "group", "attributes": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
METADATA: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "absent": lambda content: None,
    "null": lambda content: b"null",
    "zeros": lambda content: bytes(len(content)),
    "of an array": lambda content: (
        b'{"zarr_format": 3, "node_type": "array", "shape": [1], "data_type": "int8", "chunk_grid": '
        b'{"name": "regular", "configuration": {"chunk_shape": [1]}}, "chunk_key_encoding": {"name": "default"}, '
        b'"fill_value": 0, "codecs": [{"name": "bytes"}]}'
    ),
    "of a group": lambda content: b'{"zarr_format": 3, "node_type": "group", "attributes": {}}',
    "without end": lambda content: DEEP,
}


@pytest.mark.parametrize("damage", METADATA)
def test_every_zarr_json(small: tuple[Path, Path], tmp_path: Path, commands: Commands, damage: str) -> None:
    """What is in it cannot be made again from anything else: one line, nothing written, and put back it all works."""
    sound, (cli, orderly, stage_one) = small[0], commands
    cache = shutil.copytree(sound, tmp_path / "cache")
    figures = asserted(f"each zarr.json damaged: {damage}")
    for file in sorted(cache.rglob("zarr.json")):
        with figures.trial(faults=1):
            content = file.read_bytes()
            new = METADATA[damage](content)
            file.unlink()
            if new is not None:
                file.write_bytes(new)
            before = {place: place.read_bytes() for place in chunk_files(cache)}
            results = {
                "inspect": orderly("inspect-cache", cache),
                "pair": orderly("inspect-cache", cache, "--pair", 0),
                "train": orderly("train", "--ref-cache", cache, "--out", tmp_path / "run"),
                "merge": orderly("merge", cache, sound, "--ref-cache", tmp_path / "merged"),
                "stage one": stage_one(cache),
            }
            is_used = file.parent.name not in ("pairs", "ref", "ledger")
            if is_used:
                assert {code for code, _ in results.values()} == {1}, (file, results)
            assert {place: place.read_bytes() for place in chunk_files(cache)} == before, file
            shutil.rmtree(tmp_path / "merged", ignore_errors=True)
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            file.write_bytes(content)
            assert_same_store(cache, sound)
    assert cli("inspect-cache", cache, "--verify")[0] == 0
    figures.end()


CHANGES: list[Any] = [None, -1, 0, 10**30, "x", "", [], {}, True, 1.5, "../../etc/passwd", "\x00", [[]] * 3]
Keys = tuple[Any, ...]  # of dicts and places in lists


def leaves(tree: Any, path: Keys = ()) -> Iterator[Keys]:
    yield path
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from leaves(tree[key], (*path, key))


def changed(tree: Any, path: Keys, value: object) -> Any:
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if value is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def test_every_entry_of_the_manifest_by_one_who_knows_how_to_sign_it(
    small: tuple[Path, Path], tmp_path: Path, orderly: Orderly
) -> None:
    """A cache from a stranger can at worst be refused: every entry changed, missing or of another kind, the digests made to fit."""
    sound = small[0]
    cache = shutil.copytree(sound, tmp_path / "cache")
    root = json.loads((sound / "zarr.json").read_text())
    manifest = root["attributes"]["minicache"]
    content = {key: manifest[key] for key in ("identity", "log")}
    refused = 0
    for path in leaves(content):
        if not path:
            continue
        for value in [*CHANGES, ...]:
            new: dict[str, Any] = changed(content, path, value)
            signed = {**new, "identity_digest": digest_of(new.get("identity")), "digest": digest_of(new)}
            root["attributes"] = {"minicache": signed}
            (cache / "zarr.json").write_text(json.dumps(root))
            code, _ = orderly("inspect-cache", cache)
            assert orderly("inspect-cache", cache, "--json")[0] == code
            refused += code
            if not code and value in (None, ""):  # what is no reason to refuse it
                orderly("diff", cache, sound)
                orderly("merge", cache, sound, "--ref-cache", tmp_path / "merged")
                shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    assert refused > 100


def test_the_list_of_refused_rows_is_no_part_of_it(
    small: tuple[Path, Path], tmp_path: Path, orderly: Orderly, stage_one: StageOne
) -> None:
    """Whatever is in refused.jsonl, the pairs are used, and a merge lists what can be read."""
    for number, lines in enumerate(
        [b"\xff\xfe\n", b"null\n[]\n3\n{}\n", b'{"source": "x"}\n' * 9, DEEP + b"\n", b'{"source": 0']
    ):
        cache = shutil.copytree(small[0], tmp_path / f"cache-{number}")
        (cache / "refused.jsonl").write_bytes(lines)
        orderly("inspect-cache", cache)
        orderly("merge", small[0], cache, "--ref-cache", tmp_path / f"merged-{number}")
        orderly("merge", cache, small[0], "--ref-cache", tmp_path / f"other-{number}")
        assert stage_one(cache)[0] == 0
        kept = {name: data for name, data in contents(cache).items() if name != "refused.jsonl"}
        assert kept == {name: data for name, data in contents(small[0]).items() if name != "refused.jsonl"}
