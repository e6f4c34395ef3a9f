"""Compressed files that are far larger than they look, read in bounded memory."""

import bz2
import gzip
import lzma
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minicache.data.files import MOST_ARRAY, zstd
from tests.data.test_hostile import read_in_memory_of

MILLION, TIMES = 2**20, 1200
BOMBS = {  # 1.2 GB: what it begins with, is filled with and ends in; megabytes to read it in; what becomes of it
    "one line": (b'{"a": "', b"x" * MILLION, b'"}', 600, "1 too-large"),
    "no rows": (b"", b" " * MILLION + b"\n", b'{"a": 0}', 600, f"{TIMES + 1} ok"),
    "an array": (
        b"[",
        b"0," * (MILLION // 2),
        b"0]",
        2500,
        f"DataError .*a JSON array of more than {MOST_ARRAY:,} char",
    ),
}
KINDS: dict[str, Callable[..., Any]] = {
    "gzip": gzip.GzipFile,
    "zstd": zstd.ZstdFile,
    "bzip2": bz2.BZ2File,
    "xz": partial(lzma.LZMAFile, preset=0),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_is_read_in_little_memory(tmp_path: Path, kind: str, bomb: str) -> None:
    begin, filling, end, memory, expected = BOMBS[bomb]
    with KINDS[kind](tmp_path / "file", "wb") as file:
        file.write(begin)
        for _ in range(TIMES):
            file.write(filling)
        file.write(end)
    assert (tmp_path / "file").stat().st_size < 2 * MILLION
    (line,) = read_in_memory_of(memory, tmp_path / "file")
    assert re.match(expected, line), line
