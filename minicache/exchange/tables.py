"""Tables of named columns in files that other programs read: parquet, jsonl, a directory of Hugging Face `datasets`.

A table is written and read in parts, so the memory in use does not grow with it. A JSON document describes the table: in the
schema's metadata of parquet and of the directory, in FILE.minicache.json beside a jsonl file.
"""

import gzip
import io
import json
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache.data.files import is_parquet, read_rows
from minicache.disk import folder_written_whole, read_whole, written_whole
from minicache.errors import ConfigError, DataError, OutputError
from minicache.json_lines import to_json

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KEY = b"minicache"
ARROW_FILE, STATE_FILE = "data-00000-of-00001.arrow", "state.json"


@dataclass(frozen=True)
class Ragged:
    """A column with a list in each row. values: (V,) of all lists. offsets: (rows + 1,) beginning of each list; the last is V."""

    values: NDArray[np.generic]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, lists: list[NDArray[Any]]) -> "Ragged":
        return cls(np.concatenate(lists), np.cumsum([0, *map(len, lists)]))

    def tolist(self) -> list[list[Any]]:
        bounds = self.offsets.tolist()
        return [self.values[a:b].tolist() for a, b in pairwise(bounds)]


Columns = dict[str, list[str] | NDArray[Any] | Ragged]
Write = Callable[[Columns], None]
Row = dict[str, Any]


@contextmanager
def table_at(out: Path, types: dict[str, str], document: dict[str, Any]) -> Iterator[Write]:
    """A function that writes a part of the table. If the block succeeds, the whole table is at `out`, otherwise nothing.

    out: its suffix decides the format. types: name of an arrow type for each column, or "list<…>" of one.

    Raises:
        OutputError: `out` exists, or the disk refuses. ConfigError: pyarrow is not installed.
    """
    if out.exists():
        raise OutputError(f"{out}: exists already; name another --out or remove it")
    table = _json_table(out, document) if ".jsonl" in out.suffixes else _arrow_table(out, types, document)
    with table as write:
        yield write


@contextmanager
def _json_table(out: Path, document: dict[str, Any]) -> Iterator[Write]:
    with written_whole(out, is_new=True) as draft:
        with _text_writer(out, draft) as stream:
            yield lambda part: stream.writelines(_lines(part))
        with written_whole(document_beside(out)) as beside:
            beside.write_text(json.dumps(document), encoding="utf-8", newline="\n")


@contextmanager
def _arrow_table(out: Path, types: dict[str, str], document: dict[str, Any]) -> Iterator[Write]:
    arrow = _pyarrow(out)
    schema = arrow.schema({name: _type(arrow, kind) for name, kind in types.items()})
    schema = schema.with_metadata({KEY: json.dumps(document)})
    if out.suffix == ".parquet":
        with (
            written_whole(out, is_new=True) as draft,
            arrow.parquet.ParquetWriter(draft, schema, compression="zstd") as writer,
        ):
            yield lambda part: writer.write_batch(_batch(arrow, schema, part))
        return
    with folder_written_whole(out) as draft:
        with arrow.ipc.new_stream(draft / ARROW_FILE, schema) as writer:
            yield lambda part: writer.write_batch(_batch(arrow, schema, part))
        _describe(draft)


def read_document(file: str) -> dict[str, Any] | None:
    """The document of a table; None for a table without one.

    Raises:
        DataError: it exists and cannot be read.
    """
    path = Path(file)
    text: str | bytes | None = None
    try:
        if (path / ARROW_FILE).is_file():
            arrow = _pyarrow(path)
            with arrow.memory_map(str(path / ARROW_FILE)) as source:
                text = (arrow.ipc.open_stream(source).schema.metadata or {}).get(KEY)
        elif path.is_file() and is_parquet(path):
            text = (_pyarrow(path).parquet.read_schema(path).metadata or {}).get(KEY)
        elif document_beside(path).is_file():
            text = read_whole(document_beside(path))
        document = None if text is None else json.loads(text)
    # pyarrow's exceptions are subclasses of these.
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: its document cannot be read: {' '.join(str(error).split())}") from None
    if document is not None and not isinstance(document, dict):
        raise DataError(f"{file}: its document is no JSON object")
    return document


def read_table(file: str) -> Iterator[tuple[int, Any]]:
    """(number of the row or line from 1, row) of a table of `table_at`. Raises DataError as `read_rows`."""
    in_folder = Path(file) / ARROW_FILE
    return read_rows(str(in_folder) if in_folder.is_file() else file)


def document_beside(file: Path) -> Path:
    """The file of a jsonl table's document."""
    return file.with_name(f"{file.name}.minicache.json")


def _pyarrow(file: Path) -> Any:
    """The library. Raises ConfigError: it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{file}: needs pyarrow: pip install 'minidpo[parquet]'; a .jsonl file does not") from None
    return pyarrow


def _type(arrow: Any, kind: str) -> Any:
    """The arrow type of a name in `types`."""
    inner = kind.removeprefix("list<").removesuffix(">")
    scalar = arrow.type_for_alias(inner)
    return scalar if inner == kind else arrow.list_(scalar)


def _batch(arrow: Any, schema: Any, part: Columns) -> Any:
    """A part of the table as a record batch."""
    arrays = []
    for field in schema:
        column = part[field.name]
        if isinstance(column, Ragged):
            values = arrow.array(column.values, field.type.value_type)
            arrays.append(arrow.ListArray.from_arrays(arrow.array(column.offsets, arrow.int32()), values))
        else:
            arrays.append(arrow.array(column, field.type))
    return arrow.record_batch(arrays, schema=schema)


@contextmanager
def _text_writer(out: Path, draft: Path) -> Iterator[io.TextIOWrapper]:
    """A text stream, compressed by the suffix of `out`. It contains no date: the same table gives the same bytes."""
    with draft.open("wb") as raw:
        stream: Any = raw
        if out.suffix == ".gz":
            stream = gzip.GzipFile("", "wb", 6, raw, 0)
        elif out.suffix == ".zst":
            stream = zstd.ZstdFile(raw, "wb")
        with io.TextIOWrapper(stream, "utf-8", newline="\n") as text:
            yield text


def _lines(part: Columns) -> Iterator[str]:
    """The rows of a part as JSON lines."""
    columns = [column if isinstance(column, list) else column.tolist() for column in part.values()]
    for values in zip(*columns, strict=True):
        row = dict(zip(part, values, strict=True))
        yield to_json(row, allow_nan=False, separators=(",", ":")) + "\n"


def _describe(directory: Path) -> None:
    """Write the two small files that `datasets.load_from_disk` needs beside an arrow file."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": ARROW_FILE}],
        "_fingerprint": secrets.token_hex(8),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (directory / STATE_FILE).write_text(json.dumps(state), encoding="utf-8", newline="\n")
    (directory / "dataset_info.json").write_text(
        json.dumps({"citation": "", "description": ""}), encoding="utf-8", newline="\n"
    )
