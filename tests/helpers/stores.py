"""Comparing two caches on disk."""

import json
from pathlib import Path


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of a cache by its path, but for what may differ between equal caches: dates, where files lay, how many jobs."""
    files = {str(file.relative_to(cache)): file.read_bytes() for file in sorted(cache.rglob("*")) if file.is_file()}
    manifest = json.loads(files["zarr.json"])["attributes"]["minicache"]
    manifest["log"].update(created="", shards=0)
    for source in manifest["log"]["sources"]:
        source["name"] = Path(source["name"]).name
    files["zarr.json"] = json.dumps([manifest["identity"], manifest["log"]], sort_keys=True).encode()
    return files


def assert_same_store(left: Path, right: Path) -> None:
    a, b = contents(left), contents(right)
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    different = [name for name in a if a[name] != b[name]]
    assert not different, different


def chunk_files(cache: Path) -> list[Path]:
    """Every chunk of every array."""
    return sorted(file for file in cache.rglob("*") if file.is_file() and "c" in file.relative_to(cache).parts)
