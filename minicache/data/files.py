"""Preference files -> rows: jsonl, JSON arrays and parquet, plain, gzip or zstd."""

import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minicache.errors import DataError, RowRefused

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

# Most characters of a row or a text in it: four million tokens at four characters each.
MOST_ROW = 2**24
# Most characters of a longer line, which is skipped.
MOST_SKIPPED = 2**32
# Most characters of a JSON array, which is read into memory whole.
MOST_ARRAY = 2**29
# Most levels of nested objects and lists. A row of any format needs four.
MOST_DEPTH = 100
# Bytes that are not UTF-8 become lone surrogates, so that their line is refused and not the file.
BAD_BYTES = "surrogateescape"


def read_rows(path: str) -> Iterator[tuple[int, object]]:
    """(line or row number from 1, row) for each row of a jsonl, JSON array or parquet file, plain, gzip or zstd.

    A row that cannot be read is replaced by the `RowRefused` with the reason, for the caller to count.

    Raises:
        DataError: the file does not exist, is empty, or cannot be read.
    """
    file, rows = Path(path), 0
    try:
        if not file.exists():
            raise DataError(f"{path}: no such file")
        if file.is_dir():
            raise DataError(f"{path}: is a directory; give the files in it, for example {path.rstrip('/')}/*.jsonl")
        if file.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; expected one preference pair a line")
        for item in _parquet_rows(file) if is_parquet(file) else _json_rows(file):
            rows += 1
            yield item
    except (OSError, EOFError, zlib.error, zstd.ZstdError) as error:
        raise DataError(f"{path}: cannot be read after {rows} rows: {error}") from error
    if rows == 0:
        raise DataError(f"{path}: the file holds no rows; expected one preference pair a line")


def is_parquet(file: Path) -> bool:
    """Whether the file begins like a parquet file."""
    with file.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def _open_text(file: Path) -> io.TextIOWrapper:
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(file, "rt", encoding="utf-8-sig", errors=BAD_BYTES)
    if magic == b"\x28\xb5\x2f\xfd":
        return zstd.open(file, "rt", encoding="utf-8-sig", errors=BAD_BYTES)
    return file.open(encoding="utf-8-sig", errors=BAD_BYTES)


def _json_rows(file: Path) -> Iterator[tuple[int, object]]:
    with _open_text(file) as stream:
        # the buffers of plain, gzip and zstd files can all peek
        if b"\0" in stream.buffer.peek(1024)[:1024]:  # type: ignore[attr-defined]
            raise DataError(f"{file}: is not UTF-8 text; expected jsonl, a JSON array or parquet, plain, gzip or zstd")
        lines = enumerate(iter(lambda: stream.readline(MOST_ROW), ""), start=1)
        for number, line in lines:
            if not line.strip():
                _skip_rest(line, stream, file)
                continue
            # a JSON array: a line that holds an object begins with {
            if line.lstrip().startswith("["):
                yield from enumerate(_json_array(line, number, stream, file), start=1)
                return
            if line.strip() == "{":
                raise DataError(f"{file}: an object spans several lines; expected one object a line, or a JSON array")
            yield number, _json_line(line, stream, file)
            break
        for number, line in lines:
            if line.strip():
                yield number, _json_line(line, stream, file)
            else:
                _skip_rest(line, stream, file)


def _skip_rest(line: str, stream: io.TextIOWrapper, file: Path) -> bool:
    """Skip the rest of this line without keeping it. Returns whether the line is longer than a row may be.

    Raises:
        DataError: the line does not end.
    """
    if len(line) < MOST_ROW or line.endswith("\n"):
        return False
    for _ in range(MOST_SKIPPED // MOST_ROW):
        line = stream.readline(MOST_ROW)
        if not line or line.endswith("\n"):
            return True
    raise DataError(f"{file}: a line of more than {MOST_SKIPPED:,} characters; expected one preference pair a line")


def _json_line(line: str, stream: io.TextIOWrapper, file: Path) -> object:
    if _skip_rest(line, stream, file):
        return RowRefused("too-large", f"the line has more than {MOST_ROW:,} characters")
    try:
        line.encode()
        row = json.loads(line)
    except UnicodeEncodeError:
        return RowRefused("bad-unicode", "the line is not UTF-8")
    except (ValueError, RecursionError) as error:
        return RowRefused("broken-json", f"not JSON: {error}")
    return _not_too_deep(row) if line.count("[") + line.count("{") > MOST_DEPTH else row


def _json_array(line: str, number: int, stream: io.TextIOWrapper, file: Path) -> list[object]:
    """The rows of a JSON array that begins in `line`, the line with this number.

    Raises:
        DataError: the array is too large or is not JSON.
    """
    text = line + stream.read(MOST_ARRAY)
    if len(text) > MOST_ARRAY:
        raise DataError(f"{file}: a JSON array of more than {MOST_ARRAY:,} characters; expected jsonl for so many rows")
    try:
        return [_not_too_deep(row) for row in json.loads("\n" * min(number - 1, MOST_ROW) + text)]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: begins like a JSON array but is not one: {error}") from None


def _not_too_deep(row: object) -> object:
    """The row, or its refusal if it is nested too deeply to be pickled between processes."""
    level, depth = [row], 0
    while level and depth <= MOST_DEPTH:
        level = [each for item in level for each in _within(item)]
        depth += 1
    return RowRefused("broken-json", f"nested more than {MOST_DEPTH} deep") if level else row


def _within(item: object) -> Iterable[object]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


def _parquet_rows(file: Path) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file}: reading parquet needs pyarrow: pip install 'minidpo[parquet]'") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in _arrow_rows(batch):
                number += 1
                yield number, row
    except (pyarrow.ArrowException, ValueError) as error:
        line = " ".join(str(error).split())
        raise DataError(f"{file}: cannot be read as parquet after {number} rows: {line}") from None


def _arrow_rows(batch: Any) -> list[object]:
    """The rows of a record batch. A row that is not UTF-8 is found by bisection and replaced by its refusal."""
    try:
        rows: list[object] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [RowRefused("bad-unicode", "the row holds text that is not UTF-8")]
        half = len(batch) // 2
        return _arrow_rows(batch.slice(0, half)) + _arrow_rows(batch.slice(half))
