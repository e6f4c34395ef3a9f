"""Tables in columns -> rows: parquet, and arrow as `datasets` writes it. Nothing is imported before a file needs pyarrow."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minicache.errors import DataError, RowRefused

# Rows that are decoded at once.
PARQUET_ROWS, ARROW_ROWS = 1024, 256

# Row number from 1 and row.
Rows = Iterator[tuple[int, object]]


def parquet_rows(path: Path, name: str) -> Rows:
    """The rows of a parquet file. name: of the file, for errors."""
    arrow = _pyarrow(name)

    def batches() -> Iterator[Any]:
        with arrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=PARQUET_ROWS)

    return _numbered(batches, arrow.ArrowException, f"{name}: cannot be read as parquet")


def arrow_rows(path: Path, name: str) -> Rows:
    """The rows of an arrow file: a stream, as `datasets` writes it, or arrow's file format. name: of the file, for errors."""
    arrow = _pyarrow(name)

    def batches() -> Iterator[Any]:
        with arrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = arrow.ipc.open_file(source) if is_file else arrow.ipc.open_stream(source)
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
                for start in range(0, len(batch), ARROW_ROWS):
                    yield batch.slice(start, ARROW_ROWS)

    return _numbered(batches, arrow.ArrowException, f"{name}: cannot be read as arrow")


def _pyarrow(name: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{name}: reading parquet and arrow needs pyarrow: pip install 'minidpo[parquet]'") from None
    return pyarrow


def _numbered(batches: Callable[[], Iterator[Any]], problem: type[Exception], where: str) -> Rows:
    """The rows of all batches. problem: what the library raises. Raises DataError: the file is damaged; where: for that."""
    number = 0
    try:
        for batch in batches():
            for row in _rows(batch):
                number += 1
                yield number, row
    except (problem, OSError, ValueError) as error:
        raise DataError(f"{where} after {number} rows: {' '.join(str(error).split())}") from None


def _rows(batch: Any) -> list[object]:
    """The rows of a record batch. A row that is not UTF-8 is found by bisection and replaced by its refusal."""
    try:
        # Offsets in a damaged arrow file may lead outside of it.
        batch.validate(full=True)
        rows: list[object] = batch.to_pylist()
        return rows
    except ValueError as error:
        if not isinstance(error, UnicodeDecodeError) and "UTF8" not in str(error):
            raise
        if len(batch) == 1:
            return [RowRefused("bad-unicode", "the row holds text that is not UTF-8")]
        half = len(batch) // 2
        return _rows(batch.slice(0, half)) + _rows(batch.slice(half))
