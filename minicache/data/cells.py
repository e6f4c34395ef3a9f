"""Tables of text, CSV and TSV -> rows."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from minicache.data.compressed import MOST_ROW, open_text
from minicache.errors import DataError, RowRefused


class _Lines:
    """The lines of a table for `csv.reader`. number: of lines so far. row: characters of the row that is being read."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.stream, self.number, self.row = stream, 0, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.stream.readline(MOST_ROW + 1 - self.row)
        self.number, self.row = self.number + 1, self.row + len(line)
        if self.row > MOST_ROW:
            raise csv.Error(f"a row of more than {MOST_ROW:,} characters")
        if not line:
            raise StopIteration
        return line


def table_rows(path: Path, name: str, delimiter: str) -> Iterator[tuple[int, object]]:
    """(line from 1, row) for each row of a table with a line of names above them; every value is text. name: for errors.

    A quotation mark that is missing or too many shifts all that follows, so it ends the file and not a row.

    Raises:
        DataError: this is no such table.
    """
    csv.field_size_limit(MOST_ROW)
    names: list[str] = []
    with open_text(path, newline="") as stream:
        lines = _Lines(stream)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        number = 1
        try:
            while (cells := next(reader, None)) is not None:
                if names and cells:
                    yield number, _table_row(names, cells)
                elif cells:
                    names = _header(cells, name)
                number, lines.row = lines.number + 1, 0
        except csv.Error as error:
            raise DataError(
                f"{name}: the row at line {number} is not CSV: {error}; expected a cell with quotation marks, line breaks "
                f"or {delimiter!r} to be in quotation marks, those within it doubled"
            ) from None


def _header(cells: list[str], name: str) -> list[str]:
    """The names of the columns. pandas leaves that of its index empty, and reads it as here."""
    names = [cell or f"Unnamed: {at}" for at, cell in enumerate(cells)]
    if len(set(names)) < len(names) or not "".join(names).isprintable():
        shown = ", ".join(map(ascii, names))[:200]
        raise DataError(f"{name}: expected a first line with the name of each column, each once; got {shown}")
    return names


def _table_row(names: list[str], cells: list[str]) -> object:
    if len(cells) != len(names):
        return RowRefused(
            "broken-csv", f"expected {len(names)} cells, one for each name in the header, got {len(cells)}"
        )
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return RowRefused("bad-unicode", "the row is not UTF-8")
    return dict(zip(names, cells, strict=True))
