"""Tables in columns -> rows: parquet, and arrow as `datasets` writes it. Nothing is imported before a file needs pyarrow."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minicache.data.arguments import LISTS
from minicache.data.compressed import MOST_ROW
from minicache.errors import DataError, RowRefused

# Rows that are decoded at once, and of a parquet file whose row groups are larger than MOST_GROUP bytes.
PARQUET_ROWS, ARROW_ROWS, LARGE_ROWS = 1024, 256, 16
MOST_GROUP = 2**31
# Most bytes of a row, and of rows that are decoded at once: UTF-8 has up to four for a character.
MOST_BYTES = 4 * MOST_ROW

# Row number from 1 and row.
Rows = Iterator[tuple[int, object]]


class FilledRow(dict[str, Any]):
    """A row of parquet or arrow, where an object within a value has a null for each key that another row's has."""


def parquet_rows(path: Path, name: str) -> Rows:
    """The rows of a parquet file. name: of the file, for errors."""
    arrow = _pyarrow(name)

    def batches() -> Iterator[Any]:
        found = arrow.parquet.read_metadata(path)
        columns = map(found.schema.column, range(found.num_columns))
        texts = [
            each.path for each in columns if each.physical_type == "BYTE_ARRAY" and each.logical_type.type != "DECIMAL"
        ]
        groups = map(found.row_group, range(found.num_row_groups))
        is_large = any(group.total_byte_size > MOST_GROUP for group in groups)
        # a text that stands in a file once may stand in every row: it is not copied before it is measured
        with arrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            yield from file.iter_batches(batch_size=LARGE_ROWS if is_large else PARQUET_ROWS)

    return _numbered(batches, arrow, f"{name}: cannot be read as parquet")


def arrow_rows(path: Path, name: str) -> Rows:
    """The rows of an arrow file: a stream, as `datasets` writes it, or arrow's file format. name: of the file, for errors."""
    arrow = _pyarrow(name)

    def batches() -> Iterator[Any]:
        with arrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = arrow.ipc.open_file(source) if is_file else arrow.ipc.open_stream(source)
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
                # Offsets in a damaged file may lead outside of it.
                for column in batch.columns:
                    column.view(_changed(arrow, column.type, _unread)).validate(full=True)
                for start in range(0, len(batch), ARROW_ROWS):
                    yield batch.slice(start, ARROW_ROWS)

    return _numbered(batches, arrow, f"{name}: cannot be read as arrow")


def _pyarrow(name: str) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{name}: reading parquet and arrow needs pyarrow: pip install 'minidpo[parquet]'") from None
    return pyarrow


def _numbered(batches: Callable[[], Iterator[Any]], arrow: Any, where: str) -> Rows:
    """The rows of all batches. Raises DataError: the file is damaged; where: for that."""
    number = 0
    try:
        for batch in batches():
            if twins := [name for name, times in Counter(batch.schema.names).items() if times > 1]:
                raise ValueError(f"expected each column once, got two named {twins[0][:80]!r}")
            for row in _rows(arrow, batch):
                number += 1
                yield number, FilledRow(row) if isinstance(row, dict) else row
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{where} after {number} rows: {' '.join(str(error).split())}") from None


def _rows(arrow: Any, batch: Any) -> Iterator[object]:
    """The rows of a record batch, of few at once where they are large. A row that is too large is replaced by its refusal."""
    half = len(batch) // 2
    if sum(_size(arrow, column) for column in batch.columns) <= MOST_BYTES:
        yield from _read(_plain(arrow, batch))
    elif half:
        yield from _rows(arrow, batch.slice(0, half))
        yield from _rows(arrow, batch.slice(half))
    else:
        yield RowRefused("too-large", f"the row has more than {MOST_BYTES:,} bytes")


def _read(batch: Any) -> list[object]:
    """The rows of a record batch. A row that is not UTF-8 is found by bisection and replaced by its refusal."""
    try:
        batch.validate(full=True)
        rows: list[object] = batch.to_pylist()
        return rows
    except ValueError as error:
        if "UTF8" not in str(error):
            raise
    if len(batch) == 1:
        return [RowRefused("bad-unicode", "the row holds text that is not UTF-8")]
    # a slice of lists would keep what stands in the others
    half = len(batch) // 2
    return _read(batch.take([*range(half)])) + _read(batch.take([*range(half, len(batch))]))


def _size(arrow: Any, array: Any) -> int:
    """The bytes of an array once each of its values stands by itself, in Python."""
    return 8 * len(array) + _within(arrow, array)


def _within(arrow: Any, array: Any) -> int:
    kind, types = array.type, arrow.types
    if types.is_struct(kind):
        return sum(_size(arrow, part) for part in array.flatten())
    if types.is_map(kind):
        return _size(arrow, array.view(arrow.list_(arrow.struct([kind.key_field, kind.item_field]))))
    if types.is_run_end_encoded(kind):
        return len(array) * _size(arrow, array.values)
    if hasattr(array, "flatten"):
        return _size(arrow, array.flatten())
    values = array.dictionary if types.is_dictionary(kind) else array
    try:
        lengths = arrow.compute.binary_length(values)
    # no texts
    except arrow.ArrowNotImplementedError:
        return int(array.nbytes)
    return int(arrow.compute.sum(lengths.take(array.indices) if values is not array else lengths).as_py() or 0)


def _plain(arrow: Any, batch: Any) -> Any:
    """The batch with texts where it has references to texts; dates and times too, which may lie beyond those that Python has."""
    for change in (_by_itself, _as_text):
        for at, column in enumerate(batch.columns):
            kind = _changed(arrow, column.type, change)
            if kind != column.type:
                batch = batch.set_column(at, batch.schema.names[at], column.cast(kind))
    return batch


def _by_itself(arrow: Any, kind: Any) -> Any:
    """Without a time zone, which may be one that this machine does not know."""
    if arrow.types.is_dictionary(kind):
        return _by_itself(arrow, kind.value_type)
    return arrow.timestamp(kind.unit) if arrow.types.is_timestamp(kind) else kind


def _as_text(arrow: Any, kind: Any) -> Any:
    return arrow.string() if _is_time(arrow, kind) else kind


def _unread(arrow: Any, kind: Any) -> Any:
    """The type of the same buffers that has no value which is wrong: their offsets alone are looked at."""
    if arrow.types.is_dictionary(kind):
        return arrow.dictionary(kind.index_type, _unread(arrow, kind.value_type))
    if _is_time(arrow, kind):
        return arrow.int32() if kind.bit_width == 32 else arrow.int64()
    texts = {arrow.string(): arrow.binary(), arrow.large_string(): arrow.large_binary()}
    return {**texts, arrow.string_view(): arrow.binary_view()}.get(kind, kind)


def _is_time(arrow: Any, kind: Any) -> bool:
    return arrow.types.is_temporal(kind) and not arrow.types.is_interval(kind)


def _changed(arrow: Any, kind: Any, change: Callable[[Any, Any], Any]) -> Any:
    """A type in which those that it is made of are changed."""
    types = arrow.types
    if types.is_struct(kind):
        return arrow.struct([each.with_type(_changed(arrow, each.type, change)) for each in kind])
    if types.is_map(kind):
        return arrow.map_(*(_changed(arrow, each, change) for each in (kind.key_type, kind.item_type)))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = kind.value_field.with_type(_changed(arrow, kind.value_type, change))
        if types.is_fixed_size_list(kind):
            return arrow.list_(inner, kind.list_size)
        return arrow.large_list(inner) if types.is_large_list(kind) else arrow.list_(inner)
    return change(arrow, kind)


# --- what a table fills in ---


def unfilled(value: Any, name: str) -> Any:
    """A column of a `FilledRow` without nulls within its turns or answers; their own say what they lack, a schema's nothing."""
    if name in (*LISTS, "chat_template_kwargs"):
        return _without_nulls(value)
    if isinstance(value, list):
        return [unfilled(item, "") if isinstance(item, dict) else item for item in value]
    return {key: _without_nulls(each) for key, each in value.items()} if isinstance(value, dict) else value


def _without_nulls(value: Any) -> Any:
    """A JSON value without the keys that are null, as TRL's remove_none_values makes it."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
