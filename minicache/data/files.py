"""Preference files -> rows: jsonl, JSON arrays, CSV, TSV, parquet and arrow; text also compressed."""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minicache.data import compressed
from minicache.data.cells import table_rows
from minicache.data.compressed import MOST_ROW as MOST_ROW
from minicache.data.compressed import zstd as zstd
from minicache.data.tables import Rows, arrow_rows, parquet_rows
from minicache.errors import DataError, RowRefused

# Most characters of a longer line, which is skipped.
MOST_SKIPPED = 2**32
# Most characters of a JSON array, which is read into memory whole.
MOST_ARRAY = 2**29
# Most levels of nested objects and lists. A row of any format needs four.
MOST_DEPTH = 100
# What a cell of a table ends with, by the suffix of the file.
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Suffixes of files with rows, which a compressed file has before its own.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", *DELIMITERS)


@dataclass(frozen=True)
class DataFile:
    """A file with rows. name: what the user calls it, in errors and in the log of a cache. path: what to open, perhaps a copy."""

    name: str
    path: Path


def suffix_of(name: str) -> str:
    """The suffix of a file's name in lower case, without that of compression: `.csv` for `A.CSV.gz`."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem if path.suffix in compressed.SUFFIXES else path.name).suffix


def read_rows(given: str | DataFile) -> Rows:
    """(line or row number from 1, row) for each row of a file: jsonl, a JSON array, CSV, TSV, parquet or arrow.

    Text may be compressed with gzip, zstd, bzip2 or xz. A row that cannot be read is replaced by the `RowRefused` with the
    reason, for the caller to count.

    Raises:
        DataError: the file does not exist, is empty, or cannot be read.
    """
    file = given if isinstance(given, DataFile) else DataFile(given, Path(given))
    name, path, rows = file.name, file.path, 0
    try:
        if not path.exists():
            raise DataError(f"{name}: no such file")
        if path.is_dir():
            raise DataError(f"{name}: is a directory; give the files in it, for example {name.rstrip('/')}/*.jsonl")
        if path.stat().st_size == 0:
            raise DataError(f"{name}: the file is empty; expected one preference pair a line")
        for item in _rows_of(file):
            rows += 1
            yield item
    except compressed.ERRORS as error:
        problem = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: cannot be read after {rows} rows: {problem}") from error
    if rows == 0:
        raise DataError(f"{name}: the file holds no rows; expected one preference pair a line")


def is_parquet(file: Path) -> bool:
    """Whether the file begins like a parquet file."""
    with file.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def _rows_of(file: DataFile) -> Rows:
    with file.path.open("rb") as stream:
        magic = stream.read(6)
    if magic.startswith(b"PAR1"):
        return parquet_rows(file.path, file.name)
    # Arrow's two forms.
    if magic == b"ARROW1" or magic.startswith(b"\xff\xff\xff\xff"):
        return arrow_rows(file.path, file.name)
    delimiter = _delimiter(file)
    return _json_rows(file) if delimiter is None else table_rows(file.path, file.name, delimiter)


def _delimiter(file: DataFile) -> str | None:
    """What cells end with if a text file is a table: by its suffix, without one by its first line. None for JSON.

    Raises:
        DataError: it is no text in UTF-8.
    """
    with compressed.open_text(file.path) as stream:
        # all of these buffers can peek
        head: bytes = stream.buffer.peek(1024)[:1024]  # type: ignore[attr-defined]
    if b"\0" in head:
        raise DataError(
            f"{file.name}: is not UTF-8 text; expected jsonl, a JSON array, CSV or TSV, plain or compressed with gzip, zstd, "
            "bzip2 or xz; or parquet or arrow"
        )
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start or start[:1] in b"{[":
        return None
    if PurePosixPath(file.name).suffix:
        return DELIMITERS.get(suffix_of(file.name))
    first = start.splitlines()[0]
    return "\t" if b"\t" in first else "," if b"," in first else None


def _json_rows(file: DataFile) -> Rows:
    name = file.name
    with compressed.open_text(file.path) as stream:
        lines = enumerate(iter(lambda: stream.readline(MOST_ROW), ""), start=1)
        for number, line in lines:
            if not line.strip():
                _skip_rest(line, stream, name)
                continue
            # a JSON array: a line that holds an object begins with {
            if line.lstrip().startswith("["):
                yield from enumerate(_json_array(line, number, stream, name), start=1)
                return
            if line.strip() == "{":
                raise DataError(f"{name}: an object spans several lines; expected one object a line, or a JSON array")
            yield number, _json_line(line, stream, name)
            break
        for number, line in lines:
            if line.strip():
                yield number, _json_line(line, stream, name)
            else:
                _skip_rest(line, stream, name)


def _skip_rest(line: str, stream: io.TextIOWrapper, name: str) -> bool:
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
    raise DataError(f"{name}: a line of more than {MOST_SKIPPED:,} characters; expected one preference pair a line")


def _json_line(line: str, stream: io.TextIOWrapper, name: str) -> object:
    if _skip_rest(line, stream, name):
        return RowRefused("too-large", f"the line has more than {MOST_ROW:,} characters")
    try:
        line.encode()
        row = json.loads(line)
    except UnicodeEncodeError:
        return RowRefused("bad-unicode", "the line is not UTF-8")
    except (ValueError, RecursionError) as error:
        return RowRefused("broken-json", f"not JSON: {error}")
    return _not_too_deep(row) if line.count("[") + line.count("{") > MOST_DEPTH else row


def _json_array(line: str, number: int, stream: io.TextIOWrapper, name: str) -> list[object]:
    """The rows of a JSON array that begins in `line`, the line with this number.

    Raises:
        DataError: the array is too large or is not JSON.
    """
    text = line + stream.read(MOST_ARRAY)
    if len(text) > MOST_ARRAY:
        raise DataError(f"{name}: a JSON array of more than {MOST_ARRAY:,} characters; expected jsonl for so many rows")
    try:
        return [_not_too_deep(row) for row in json.loads("\n" * min(number - 1, MOST_ROW) + text)]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: begins like a JSON array but is not one: {error}") from None


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
