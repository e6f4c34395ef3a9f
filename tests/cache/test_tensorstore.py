"""docs/cache-format.md as a program: another zarr implementation reads every array, and digests are recomputed by the page alone.

What reads and recomputes here imports nothing of minicache; that only makes the cache, and says at the end what it reads itself.
"""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import make_rows, precompute_into, write_jsonl

tensorstore = pytest.importorskip("tensorstore", reason="needs tensorstore: pip install '.[dev]'")

ARRAYS = [
    *("pairs/tokens", "pairs/loss_mask", "pairs/lengths", "pairs/digest", "pairs/source"),
    *("ref/logp_mean", "ref/token_count", "ref/token_logps", "ledger/pairs", "ledger/ref"),
]
MAX_LENGTH, BLOCK_PAIRS = 96, 8


@pytest.fixture(scope="module", params=[400, 70_000], ids=["uint16", "int32"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """20 pairs of two files in blocks of 8, by models of small and large vocabulary; the last block of each file is not full."""
    from tests.conftest import tiny_llama

    home = tmp_path_factory.mktemp("format")
    tiny_llama(request.param).save_pretrained(home / "model")
    files = [write_jsonl(home / f"{seed}.jsonl", make_rows(10, seed=seed)) for seed in (1, 2)]
    options = {"max_length": MAX_LENGTH, "block_pairs": BLOCK_PAIRS, "per_token": True}
    return precompute_into(home / "cache", home / "model", *files, tokenizer=str(tokenizer_dir), **options)


class Reader:
    """A reader of caches, from the page."""

    def __init__(self, cache: Path) -> None:
        self.manifest = json.loads((cache / "zarr.json").read_text())["attributes"]["minicache"]
        self.identity = self.manifest["identity"]
        self.arrays = {name: self._open(cache / name) for name in ARRAYS}
        self.blocks = self.arrays["ledger/pairs"].shape[0]

    def _open(self, path: Path) -> Any:
        return tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}, read=True, open=True
        ).result()

    def read(self, name: str, block: int) -> np.ndarray:
        _, pairs, tokens, _, _ = self.arrays["ledger/pairs"][block].read().result().tolist()
        row = self.arrays[name][block]
        if not name.startswith("ledger/"):
            row = row[: pairs if row.rank == 2 else tokens]
        values: np.ndarray = row.read().result()
        return values

    def ledger_rows(self, block: int) -> list[list[int]]:
        """Both rows of a block, from its data."""
        data = {name: self.read(name, block) for name in ARRAYS}
        identity = int(self.manifest["identity_digest"][:15], 16)
        sizes = [len(data["pairs/lengths"]), len(data["pairs/tokens"])]
        names = ["pairs/tokens", "pairs/loss_mask", "pairs/lengths", "pairs/digest", "pairs/source"]
        of_pairs = [identity, *sizes, int(data["pairs/loss_mask"].sum()), number(data[name] for name in names)]
        names = ["ref/logp_mean", "ref/token_count", "ref/token_logps"]
        scores = [np.array(of_pairs, "<i8"), *(data[name] for name in names)]
        return [of_pairs, [identity, *sizes, int(data["ref/token_count"].sum()), number(scores)]]

    def pair_digests(self, block: int) -> list[list[int]]:
        digests, end = [], 0
        tokens, mask = self.read("pairs/tokens", block), self.read("pairs/loss_mask", block)
        for lengths in self.read("pairs/lengths", block):
            begin, end = end, end + int(lengths.sum())
            parts = lengths.astype("<i8"), tokens[begin:end].astype("<i4"), mask[begin:end]
            raw = blake2b(b"".join(part.tobytes() for part in parts), digest_size=16).digest()
            digests.append([int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")])
        assert end == len(tokens)
        return digests


def number(arrays: Any) -> int:
    raw = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little", signed=True)


def digest_of_json(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def test_another_zarr_implementation_reads_every_array_equal(cache: Path) -> None:
    from minicache import ReferenceCache
    from minicache.cache.complete import ledgers

    reader, opened = Reader(cache), ReferenceCache.open(cache)
    assert reader.blocks == len(opened.blocks) == 4 and set(ARRAYS) == opened.blocks.arrays.by_name.keys()
    for block in range(reader.blocks):
        table, reference = opened.blocks.whole(block)
        ours = {f"pairs/{name}": column for name, column in vars(table).items()}
        ours |= {f"ref/{name}": column for name, column in vars(reference).items()}
        rows = ledgers(opened.blocks)[block]
        ours |= {"ledger/pairs": rows[0], "ledger/ref": rows[1]}
        for name in ARRAYS:
            theirs = reader.read(name, block)
            assert theirs.dtype == ours[name].dtype and np.array_equal(theirs, ours[name], equal_nan="logp" in name), (
                name
            )


def test_ledger_rows_and_pair_digests_follow_from_the_page(cache: Path) -> None:
    reader = Reader(cache)
    for block in range(reader.blocks):
        stored = [reader.read(name, block).tolist() for name in ("ledger/pairs", "ledger/ref")]
        assert reader.ledger_rows(block) == stored
        assert reader.pair_digests(block) == reader.read("pairs/digest", block).tolist()


def test_the_scores_are_what_the_page_says(cache: Path) -> None:
    reader = Reader(cache)
    for block in range(reader.blocks):
        logps, mask = reader.read("ref/token_logps", block), reader.read("pairs/loss_mask", block)
        assert np.array_equal(np.isfinite(logps), mask == 1)
        end = 0
        for index, (prefix, chosen, rejected) in enumerate(reader.read("pairs/lengths", block).tolist()):
            begin, end = end, end + prefix + chosen + rejected
            shared, sides = logps[begin : begin + prefix], np.split(logps[begin + prefix : end], [chosen])
            for side, own in enumerate(sides):
                counted = np.concatenate([shared, own])
                assert np.isfinite(counted).sum() == reader.read("ref/token_count", block)[index, side]
                assert np.nanmean(counted) == pytest.approx(reader.read("ref/logp_mean", block)[index, side], abs=1e-5)


def test_the_manifest_follows_from_the_page(cache: Path) -> None:
    manifest = Reader(cache).manifest
    identity, log = manifest["identity"], manifest["log"]
    assert manifest["identity_digest"] == digest_of_json(identity)
    assert manifest["digest"] == digest_of_json({"identity": identity, "log": log})
    tokenizer = json.loads((cache / "tokenizer" / "tokenizer.json").read_text())
    used = {name: tokenizer.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    assert identity["tokenizer"] == blake2b(json.dumps(used, sort_keys=True).encode(), digest_size=16).hexdigest()
    config = json.loads((cache / "tokenizer" / "tokenizer_config.json").read_text())
    special = {name: value for name, value in config.items() if name.endswith("_token") and value}
    assert identity["template"] == digest_of_json([(cache / "tokenizer" / "chat_template.jinja").read_text(), special])
    assert log["pairs"] == sum(source["kept"] for source in log["sources"]) == 20


def test_metadata_and_keys_are_those_of_the_page(cache: Path) -> None:
    reader = Reader(cache)
    most = 2 * BLOCK_PAIRS * MAX_LENGTH
    chunk = 1 << (most - 1).bit_length()
    token_type = "uint16" if reader.identity["vocabulary"] <= 65535 else "int32"
    rows: dict[str, tuple[str, int, object]] = {
        "lengths": ("int32", 3, -1),
        "digest": ("uint64", 2, 2**64 - 1),
        "source": ("int64", 2, -1),
    }
    rows |= {"logp_mean": ("float32", 2, "NaN"), "token_count": ("int32", 2, -1)}
    flat: dict[str, tuple[str, object]] = {
        "tokens": (token_type, 65535 if token_type == "uint16" else -1),
        "loss_mask": ("uint8", 255),
    }
    flat["token_logps"] = ("float32", "NaN")
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    zstd = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
    for array in ARRAYS:
        group, name = array.split("/")
        found = json.loads((cache / array / "zarr.json").read_text())
        codecs, places = list(plain), "0/0"
        fill: object
        if group == "ledger":
            kind, fill, shape, places = "int64", -1, [5], "0"
        elif name in flat:
            (kind, fill), shape, codecs, places = flat[name], [chunk], [plain[0], zstd, plain[1]], "0"
        else:
            kind, width, fill = rows[name]
            shape = [BLOCK_PAIRS, width]
        if kind == "uint8":
            codecs[0] = {"name": "bytes"}
        assert found["data_type"] == kind and found["fill_value"] == fill
        assert found["shape"] == [4, *shape] and found["chunk_grid"]["configuration"]["chunk_shape"] == [1, *shape]
        assert found["codecs"] == codecs and found["chunk_key_encoding"]["configuration"] == {"separator": "/"}
        keys = {str(file.relative_to(cache / array)) for file in (cache / array / "c").rglob("*") if file.is_file()}
        assert keys == {f"c/{block}/{places}" for block in range(4)}


def test_a_changed_byte_is_found(cache: Path, tmp_path: Path) -> None:
    import shutil

    damaged = shutil.copytree(cache, tmp_path / "damaged")
    chunk = damaged / "pairs" / "lengths" / "c" / "1" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    reader = Reader(damaged)
    assert reader.ledger_rows(0)[0] == reader.read("ledger/pairs", 0).tolist()
    with pytest.raises(ValueError, match=r"(?i)crc32c|checksum|digest"):
        reader.read("pairs/lengths", 1)
