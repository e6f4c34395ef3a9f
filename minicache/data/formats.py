"""Rows of preference files to `Pair`: one function a format, and the reading of the files that hold them.

A row's format is found by looking at the row (`FORMATS`, in order) unless the user forces one.
"""

import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minicache.data.records import ROLES, Pair, Turn
from minicache.errors import DataError, RowRefused

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Row = dict[str, Any]
Conversations = tuple[list[Turn], list[Turn]]  # whole chosen, whole rejected

ROLE_NAMES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "observation": "tool",
    "function_call": "assistant",
}
MOST_ROW = 2**24  # characters of a line or a text: 8 times what a model of a million tokens reads
MOST_SKIPPED = 2**32  # characters of a line that is passed over
MOST_ARRAY = 2**29  # characters of a JSON array, which is in memory as a whole
MOST_DEPTH = 100  # objects and lists within each other; a row of any format needs four
BAD_BYTES = "surrogateescape"  # bytes that are no UTF-8 become lone surrogates: one line is refused, not the file
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


# --- one function a format: a row -> two whole conversations ---


def from_messages(row: Row) -> Conversations:
    """`chosen` and `rejected` are lists of {role, content}; `prompt` is absent, a string or a list (MiniMind, UltraFeedback)."""
    sides = [_turns(row[side], side) for side in ("chosen", "rejected")]
    if not all(sides):
        raise RowRefused("empty-answer", "a side has no turns")
    whole = any(side[0].role != "assistant" for side in sides)  # the sides carry the prompt themselves
    if row.get("prompt") is None or (whole and not isinstance(row["prompt"], list)):
        return sides[0], sides[1]
    prompt = _prompt(row["prompt"], "prompt")
    if not whole:
        return prompt + sides[0], prompt + sides[1]
    if any(side[: len(prompt)] != prompt for side in sides):
        raise RowRefused("prompts-differ", "the sides carry a prompt themselves, and it does not begin with 'prompt'")
    return sides[0], sides[1]


def from_prompt(row: Row) -> Conversations:
    """`prompt`, `chosen`, `rejected` strings (TRL); the prompt may also be a list of {role, content}."""
    return _answers(_prompt(row["prompt"], "prompt"), row["chosen"], row["rejected"])


def from_stack_exchange(row: Row) -> Conversations:
    """`question`, `response_j` (preferred), `response_k` (lvwerra/stack-exchange-paired)."""
    return _answers(_prompt(row["question"], "question"), row["response_j"], row["response_k"])


def from_sharegpt(row: Row) -> Conversations:
    """`conversations` of {from, value}; `chosen` and `rejected` one such turn or a list of them (LLaMA-Factory)."""
    prompt = _turns(row["conversations"], "conversations")
    if row.get("system"):
        prompt = [Turn("system", _text(row["system"], "system")), *prompt]
    sides = [row[side] if isinstance(row[side], list) else [row[side]] for side in ("chosen", "rejected")]
    return prompt + _turns(sides[0], "chosen"), prompt + _turns(sides[1], "rejected")


def from_transcript(row: Row) -> Conversations:
    r"""`chosen` and `rejected` are transcripts "\n\nHuman: … \n\nAssistant: …" (Anthropic HH). Turns are stripped."""
    return _transcript(row["chosen"], "chosen"), _transcript(row["rejected"], "rejected")


def _is_transcript(row: Row) -> bool:
    return isinstance(row["chosen"], str) and row["chosen"].startswith("\n\nHuman:")


# name -> (fields it needs, further test, reader); the first that fits a row reads it
FORMATS: dict[str, tuple[set[str], Callable[[Row], bool], Callable[[Row], Conversations]]] = {
    "sharegpt": ({"conversations", "chosen", "rejected"}, lambda row: True, from_sharegpt),
    "stack-exchange": ({"question", "response_j", "response_k"}, lambda row: True, from_stack_exchange),
    "messages": ({"chosen", "rejected"}, lambda row: isinstance(row["chosen"], list), from_messages),
    "prompt": ({"prompt", "chosen", "rejected"}, lambda row: isinstance(row["chosen"], str), from_prompt),
    "hh": ({"chosen", "rejected"}, _is_transcript, from_transcript),
}


def to_pair(row: object, file: str, line: int, format: str = "auto") -> Pair:
    """Read one row.

    Raises:
        RowRefused: with a reason code and what was expected.
    """
    if not isinstance(row, dict):
        raise RowRefused("wrong-type", f"expected an object, got {_kind(row)}")
    chosen, rejected = _reader(row, format)(row)
    return Pair.from_conversations(chosen, rejected, file, line)


def to_prompt(row: object) -> tuple[Turn, ...]:
    """The turns that a row asks an answer to: text, `prompt`, `messages` or `conversations`, or a preference row's prompt.

    An answer that a conversation ends in is left out, so that files of dialogues and of pairs serve as they are.

    Raises:
        RowRefused: with a reason code and what was expected.
    """
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise RowRefused("wrong-type", f"expected an object or text, got {_kind(row)}")
    if "chosen" in row or "rejected" in row or "response_j" in row:
        return to_pair(row, "", 0).prompt
    field = next((name for name in ("messages", "conversations", "prompt") if row.get(name) is not None), None)
    if field is None:
        raise RowRefused(
            "missing-field", f"expected 'prompt', 'messages' or 'conversations'; the row has {_listed(row)}"
        )
    turns = _prompt(row[field], field)
    if row.get("system"):
        turns = [Turn("system", _text(row["system"], "system")), *turns]
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns or turns[-1].role == "system" or not turns[-1].content.strip():
        raise RowRefused("no-prompt", f"{field!r} asks nothing: expected a turn of the user's with text in it")
    return tuple(turns)


def _reader(row: Row, format: str) -> Callable[[Row], Conversations]:
    if format != "auto":
        fields, _, reader = FORMATS[format]
        if missing := sorted(fields - row.keys()):
            raise RowRefused("missing-field", f"format {format} needs {_listed(missing)}; the row has {_listed(row)}")
        return reader
    for fields, test, reader in FORMATS.values():
        if fields <= row.keys() and test(row):
            return reader
    if "chosen" in row and "rejected" in row:
        if isinstance(row["chosen"], str):
            raise RowRefused("missing-field", "chosen and rejected are strings, and there is no 'prompt'")
        raise RowRefused("wrong-type", f"'chosen' must be text or a list of turns, got {_kind(row['chosen'])}")
    if any(fields & row.keys() for fields, _, _ in FORMATS.values()):
        raise RowRefused("missing-field", f"a pair needs both answers; the row has {_listed(row)}")
    raise RowRefused("unknown-format", f"no known format has the fields {_listed(row)}; formats: {', '.join(FORMATS)}")


# --- the small readers the formats share ---


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise RowRefused("wrong-type", f"{field!r} must be text, got {_kind(value)}")
    if len(value) > MOST_ROW:
        raise RowRefused("too-large", f"{field!r} has {len(value):,} characters, expected {MOST_ROW:,} or fewer")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowRefused("bad-unicode", f"{field!r} holds a lone surrogate, which no UTF-8 text can") from None
    return value


def _turns(value: object, field: str) -> list[Turn]:
    if not isinstance(value, list):
        raise RowRefused("wrong-type", f"{field!r} must be a list of turns, got {_kind(value)}")
    return [_turn(item, field) for item in value]


def _turn(item: object, field: str) -> Turn:
    if not isinstance(item, dict):
        raise RowRefused("wrong-type", f"a turn of {field!r} must be an object, got {_kind(item)}")
    role_key, text_key = ("from", "value") if "from" in item else ("role", "content")
    for key in (role_key, text_key):
        if key not in item:
            raise RowRefused("missing-field", f"a turn of {field!r} has no {key!r}; it has {_listed(item)}")
    role = ROLE_NAMES.get(_text(item[role_key], role_key).lower())
    if role is None:
        raise RowRefused("unknown-role", f"role {item[role_key][:40]!r} in {field!r}; known: {', '.join(ROLE_NAMES)}")
    return Turn(role, _text(item[text_key], text_key))


def _prompt(value: object, field: str) -> list[Turn]:
    return _turns(value, field) if isinstance(value, list) else [Turn("user", _text(value, field))]


def _answers(prompt: list[Turn], chosen: object, rejected: object) -> Conversations:
    return (
        [*prompt, Turn("assistant", _text(chosen, "chosen"))],
        [*prompt, Turn("assistant", _text(rejected, "rejected"))],
    )


def _transcript(value: object, field: str) -> list[Turn]:
    parts = HH_TURN.split(_text(value, field))
    if parts[0].strip() or len(parts) < 3:
        raise RowRefused("wrong-type", rf"{field!r} does not read '\n\nHuman: …\n\nAssistant: …'")
    return [
        Turn("user" if who == "Human" else "assistant", text.strip())
        for who, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _listed(names: object) -> str:
    assert isinstance(names, (list, dict))
    return ", ".join(repr(str(name)[:40]) for name in list(names)[:8]) or "none"


# --- files ---


def read_rows(path: str) -> Iterator[tuple[int, object]]:
    """(line or row number from 1, row) of a jsonl, JSON array or parquet file, plain, gzip or zstd.

    A line that is no JSON comes as the `RowRefused` itself, for the caller to count.

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
        if b"\0" in stream.buffer.peek(1024)[:1024]:  # type: ignore[attr-defined]  # all three kinds can peek
            raise DataError(f"{file}: is no UTF-8 text; expected jsonl, a JSON array or parquet, plain, gzip or zstd")
        lines = enumerate(iter(lambda: stream.readline(MOST_ROW), ""), start=1)
        for number, line in lines:
            if not line.strip():
                _skip_rest(line, stream, file)
                continue
            if line.lstrip().startswith("["):  # a JSON array: an object a line never begins so
                yield from enumerate(_json_array(line, number, stream, file), start=1)
                return
            if line.strip() == "{":
                raise DataError(f"{file}: an object is spread over lines; expected one object a line, or a JSON array")
            yield number, _json_line(line, stream, file)
            break
        for number, line in lines:
            if line.strip():
                yield number, _json_line(line, stream, file)
            else:
                _skip_rest(line, stream, file)


def _skip_rest(line: str, stream: io.TextIOWrapper, file: Path) -> bool:
    """Go on to the next line; whether this one is longer than a row may be. Nothing of it is kept.

    Raises:
        DataError: it does not end.
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
    """The rows of an array that begins in a line, which is the number-th."""
    text = line + stream.read(MOST_ARRAY)
    if len(text) > MOST_ARRAY:
        raise DataError(f"{file}: a JSON array of more than {MOST_ARRAY:,} characters; expected jsonl for so many rows")
    try:
        return [_not_too_deep(row) for row in json.loads("\n" * min(number - 1, MOST_ROW) + text)]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: begins like a JSON array but is not one: {error}") from None


def _not_too_deep(row: object) -> object:
    """The row, or its refusal: processes cannot send each other what is nested as deeply as JSON may be."""
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
        raise DataError(f"{file}: reading parquet needs pyarrow: pip install 'minicache[parquet]'") from None
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
    """The rows of a record batch; in the place of one that is not UTF-8, its refusal, found by halving."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [RowRefused("bad-unicode", "the row holds text that is not UTF-8")]
        half = len(batch) // 2
        return _arrow_rows(batch.slice(0, half)) + _arrow_rows(batch.slice(half))
