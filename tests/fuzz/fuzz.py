"""Coverage-guided fuzzing (atheris) of what reads other people's files: a data file, or a manifest that fits its digest.

The first byte says which. Whatever the rest is, it is read or refused by an error of ours; anything else ends the run and is kept
as crash-….
"""

import gzip
import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["minicache", "json"]):
    from minicache.cache.identity import FORMAT_VERSION, digest_of
    from minicache.cache.manifest import Manifest
    from minicache.data.files import read_rows, zstd
    from minicache.data.formats import to_pair, to_prompt
    from minicache.errors import CacheError, DataError, RowRefused

SAMPLE = Path(__file__).parents[2] / "minicache" / "sample" / "train.jsonl"
IDENTITY = {
    "format_version": FORMAT_VERSION, "weights": "w", "family": "llama", "tokenizer": "t", "template": "p", "vocabulary": 400,
    "max_length": 32, "truncate": "right", "loss_on": "response", "think": "keep", "dtype": "float32", "attention": "sdpa",
    "block_pairs": 4, "per_token": True,
}  # fmt: skip
LOG = {
    "model": "m", "created": "2026-01-01", "versions": {"a": "1"}, "blocks": 1, "pairs": 1, "shards": 0,
    "sources": [{"name": "f", "size": 1, "sha256": "s", "rows": 1, "kept": 1, "refused": {"x": 1}, "complete": True}],
}  # fmt: skip


def read_file(data: bytes, file: Path) -> None:
    file.write_bytes(data)
    with suppress(DataError):
        for line, row in read_rows(str(file)):
            for read in (to_pair, lambda row, *_: to_prompt(row)):
                with suppress(RowRefused):
                    read(row, "f", line)


def read_manifest(data: bytes) -> None:
    try:
        content = json.loads(data)
        digest = digest_of({"identity": content["identity"], "log": content.get("log")})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
    with suppress(CacheError):
        manifest = Manifest.from_attributes({"minicache": {**content, "digest": digest}}, "here")
        assert manifest.identity.digest


def seeds(place: Path) -> None:
    """One of each kind to begin with."""
    lines = SAMPLE.read_bytes().splitlines()[:2]
    rows = [
        b"\n".join(lines),
        b"[" + b",".join(lines) + b"]",
        b'{"prompt": "a", "chosen": "b", "rejected": "c"}',
        b'{"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"}, "rejected": []}',
        b'{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}',
        b'{"question": "a", "response_j": "b", "response_k": "c", "system": "d"}',
    ]
    rows += [gzip.compress(rows[2]), zstd.compress(rows[2])]
    manifest = json.dumps({"identity": IDENTITY, "log": LOG}).encode()
    for number, seed in enumerate([*(b"\0" + row for row in rows), b"\1" + manifest]):
        (place / str(number)).write_bytes(seed)


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        file, corpus = Path(place) / "file", Path(place) / "corpus"
        corpus.mkdir()
        seeds(corpus)

        def one(data: bytes) -> None:
            if data[:1] == b"\1":
                read_manifest(data[1:])
            elif data:
                read_file(data[1:], file)

        atheris.Setup([*sys.argv, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
