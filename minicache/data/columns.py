"""The columns of a row: which of them the row's form reads, and what becomes of the others.

A column that nothing reads is listed, unless a model would have seen what it holds (`system`, `tools`, `images`, …): then the row
is refused by name. Columns that repeat what is read, and those that are null or empty, are harmless.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from minicache.data.records import Note, is_blank, is_empty, texts_in
from minicache.data.tables import FilledRow, unfilled
from minicache.data.turns import MEDIA, ROLE_NAMES
from minicache.data.values import listed
from minicache.errors import ConfigError, RowRefused

Row = dict[str, Any]

# Columns with a whole dialogue, perhaps another version of it than the pair's.
TALKS = ("messages", "conversation", "conversations", "dialogue", "dialog")
# Columns with something that a model is meant to see.
SEEN = {
    *(*MEDIA, *TALKS),
    *("system", "system_prompt", "system_message", "custom_system_prompt", "instruction", "instructions", "input", "query"),
    *("question", "prompt", "problem", "context", "contexts", "history", "tools", "functions", "documents", "document"),
    *("passage", "passages", "reference", "references", "knowledge", "background", "post", "article"),
    *("chat_template_kwargs", "prefix", "prefill"),
}  # fmt: skip
# Characters from which a text that occurs within another is no chance.
TELLING = 20


@dataclass(frozen=True)
class Reading:
    """How the rows of a file become pairs: the options of that name, as they were typed.

    format: "auto", or the name of a form. columns: "target=path,…". ignore_fields: "name,…". pairs: which pairs a ranked list
    gives; "" is none. limit: read only the first rows. sample: read only so many rows, chosen by their content and sample_seed.
    """

    format: str = "auto"
    columns: str = ""
    ignore_fields: str = ""
    pairs: str = ""
    limit: int | None = None
    sample: int | None = None
    sample_seed: int = 0

    @property
    def others(self) -> dict[str, str]:
        """The options beside `format` that are not as they are by default."""
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "format"}
        return {name: str(value) for name, value in given.items() if value not in ("", None, 0)}

    @property
    def options(self) -> dict[str, str]:
        """`format` and the other options that are not as they are by default, as a cache's log holds them."""
        return {"format": self.format, **self.others}

    def require_sound(self) -> None:
        """Raises ConfigError: `columns` is not NAME=COLUMN,…"""
        self.renamed  # noqa: B018

    @property
    def renamed(self) -> dict[str, str]:
        """Target -> path of the column that stands for it. Raises ConfigError: `columns` has another form."""
        found: dict[str, str] = {}
        for entry in filter(None, self.columns.split(",")):
            target, _, path = (part.strip() for part in entry.partition("="))
            if not target or not path or target in found:
                raise ConfigError(
                    f"--columns {self.columns}: expected NAME=COLUMN,… with each name once, got {entry!r}"
                )
            found[target] = path
        return found

    @property
    def ignored(self) -> frozenset[str]:
        """The columns, and keys of turns, to pass over."""
        return frozenset(name.strip() for name in self.ignore_fields.split(",") if name.strip())


def as_typed(options: Mapping[str, str]) -> str:
    """Options as they are typed."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


class Columns:
    """A row that remembers which of its columns were read."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.values = {name: _conversation(value, name) for name, value in row.items() if value is not None}
        self.unread = dict.fromkeys(self.values)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Any:
        """The value of a column, which counts as read from now on. Raises RowRefused: the row has none."""
        if name not in self.values:
            raise RowRefused("missing-field", f"expected {name!r}; the row has {listed(self.values)}")
        self.unread.pop(name, None)
        return self.values[name]

    def first(self, *names: str) -> str | None:
        """The name of the first of these columns that is there and not empty, or None."""
        return next((name for name in names if not is_empty(self.values.get(name))), None)

    def get(self, *names: str) -> Any:
        """The value of the first of these columns that is there and not empty, or None."""
        name = self.first(*names)
        return None if name is None else self[name]

    def left(self, *names: str) -> Any:
        """As `get`, of the columns that were not read yet and do not hold the JSON text of something empty."""
        return self.get(*(name for name in names if name in self.unread and not is_blank(self.values[name])))

    def leave(self, name: str, item: Mapping[str, Any], read: tuple[str, ...]) -> None:
        """Count the keys of a column's object that were not read as columns of their own."""
        for key in item.keys() - {*read}:
            if item[key] is not None:
                self.values.setdefault(f"{name}.{key}", item[key])
                self.unread.setdefault(f"{name}.{key}")

    def notes(self, used: Iterable[str]) -> list[Note]:
        """A note for each column that was not read. used: the texts of the pair.

        Raises:
            RowRefused: such a column holds something that a model would have seen.
        """
        if not self.unread:
            return []
        notes, texts = [], [text.strip() for text in used]
        for name in self.unread:
            value = self.values[name]
            if is_blank(value) or (name in SEEN and name not in MEDIA and _repeats(name, value, texts)):
                continue
            if name in MEDIA:
                raise RowRefused(
                    "media",
                    f"the row has {name!r}; expected text: minidpo trains language models on text alone "
                    f"(--ignore-fields {name} goes on without)",
                )
            if name in SEEN or name.rpartition(".")[2] in SEEN:
                raise RowRefused(
                    "unused-field",
                    f"{name!r} holds what a model is meant to see, and this form of a row does not use it "
                    f"(read: {listed([each for each in self.values if each not in self.unread])}); expected --columns "
                    f"NAME={name} with its meaning, or --ignore-fields {name}",
                )
            notes.append(Note("unused", name))
        return notes


def _repeats(name: str, value: object, texts: list[str]) -> bool:
    """Whether a column says what the pair says, so that nothing is lost without it: all of its texts, or of a dialogue any."""
    keys = (*ROLE_NAMES, *("role", "content", "from", "value", "input", "output"))
    found = [text.strip() for text in texts_in(value) if text not in keys]
    enough = any if name in TALKS else all
    return bool(found) and enough(
        any(text == used or (len(text) >= TELLING and text in used) for used in texts) for text in found
    )


def _conversation(value: Any, name: str) -> Any:
    """A conversation that is a JSON text, as CSV files and votes hold it, as its list; any other value as it is."""
    if not isinstance(value, str) or value[:1] != "[":
        return value
    if value.startswith("[{'") and ("'role':" in value[:400] or "'from':" in value[:400]):
        raise RowRefused("wrong-type", f"{name!r} holds a list as Python prints it; expected JSON")
    if not value[1:].lstrip().startswith('{"'):
        return value
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_talk = items and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items)
    return items if is_talk else value


def columns_of(row: Row, reading: Reading) -> Columns:
    """The columns of a row as the options have them, without the nulls that parquet and arrow fill in.

    These go here and not where rows are read, because a sample's rows are chosen by all that a file says (`data.sampling`).
    """
    is_filled = isinstance(row, FilledRow)
    if reading.columns or reading.ignore_fields:
        row = with_reading(row, reading)
    return Columns({name: unfilled(value, name) for name, value in row.items()} if is_filled else row)


def with_reading(row: Row, reading: Reading) -> Row:
    """The row with its columns renamed and without the fields to pass over, in its turns too."""
    if ignored := reading.ignored:
        row = {name: _without(value, _inner(name, ignored)) for name, value in row.items() if name not in ignored}
    return _renamed(row, reading.renamed) if reading.columns else row


def _inner(column: str, ignored: frozenset[str]) -> frozenset[str]:
    """The fields to pass over within a column, which may be named with it: `completions.system`."""
    return ignored | {name.removeprefix(f"{column}.") for name in ignored if name.startswith(f"{column}.")}


def _without(value: Any, ignored: frozenset[str]) -> Any:
    """A list of objects, or an object, without these keys; any other value as it is."""
    if isinstance(value, list):
        return [_without(item, ignored) if isinstance(item, dict) else item for item in value]
    if isinstance(value, dict):
        return {
            name: each
            for name, each in value.items()
            if name not in ignored or name in ("role", "content", "from", "value")
        }
    return value


def _renamed(row: Row, renamed: Mapping[str, str]) -> Row:
    """The row with the values at these paths, such as `a.b` or `answers.0.text`, as columns. The rest keeps its names.

    Raises:
        RowRefused: the row has nothing at a path.
    """
    paths = {target: [path] if path in row else path.split(".") for target, path in renamed.items()}
    found = {}
    for target, path in paths.items():
        value: Any = row
        for name in path:
            is_index = isinstance(value, list) and name.isdecimal() and int(name) < len(value)
            if not is_index and not (isinstance(value, dict) and name in value):
                raise RowRefused("missing-field", f"--columns {target}={renamed[target]}: the row has {listed(row)}")
            value = value[int(name)] if is_index else value[name]
        found[target] = value
    return {**dict(_left(row, "", list(paths.values()))), **found}


def _left(value: Any, name: str, paths: list[list[str]]) -> Iterator[tuple[str, Any]]:
    """Name and value of everything in `value` that no path leads to."""
    if not paths:
        yield name, value
    elif [] not in paths:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            inner = [path[1:] for path in paths if path[0] == str(key)]
            yield from _left(each, f"{name}.{key}" if name else str(key), inner)
