"""Rows of preference files -> `Pair`: one function for each format.

The format of a row is the first in `FORMATS` that fits it, unless the user names one.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from minicache.data.files import MOST_ROW
from minicache.data.records import ROLES, Pair, Turn
from minicache.errors import RowRefused

Row = dict[str, Any]


# The whole chosen and the whole rejected conversation.
Conversations = tuple[list[Turn], list[Turn]]


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


HH_TURN = re.compile(r"\n\n(Human|Assistant):")


# --- one function for each format: a row -> two whole conversations ---


def from_messages(row: Row) -> Conversations:
    """`chosen` and `rejected` are lists of {role, content}; `prompt` is absent, a string or a list (MiniMind, UltraFeedback)."""
    sides = [_turns(row[side], side) for side in ("chosen", "rejected")]
    if not all(sides):
        raise RowRefused("empty-answer", "a side has no turns")
    # Whether the sides repeat the prompt.
    whole = any(side[0].role != "assistant" for side in sides)
    if row.get("prompt") is None or (whole and not isinstance(row["prompt"], list)):
        return sides[0], sides[1]
    prompt = _prompt(row["prompt"], "prompt")
    if not whole:
        return prompt + sides[0], prompt + sides[1]
    if any(side[: len(prompt)] != prompt for side in sides):
        raise RowRefused("prompts-differ", "each side repeats a prompt, and that prompt does not begin with 'prompt'")
    return sides[0], sides[1]


def from_prompt(row: Row) -> Conversations:
    """`prompt`, `chosen`, `rejected` strings (TRL); the prompt may also be a list of {role, content}."""
    return _answers(_prompt(row["prompt"], "prompt"), row["chosen"], row["rejected"])


def from_stack_exchange(row: Row) -> Conversations:
    """`question`, `response_j` (preferred), `response_k` (lvwerra/stack-exchange-paired)."""
    return _answers(_prompt(row["question"], "question"), row["response_j"], row["response_k"])


def from_sharegpt(row: Row) -> Conversations:
    """`conversations` are {from, value}; `chosen` and `rejected` are one such turn or a list of them (LLaMA-Factory)."""
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


class Format(NamedTuple):
    """A row format.

    fields: the fields it needs. read: a row -> the two whole conversations. fits: a further test of a row.
    """

    fields: set[str]
    read: Callable[[Row], Conversations]
    fits: Callable[[Row], bool] = lambda row: True


# The first format that fits a row reads it.
FORMATS: dict[str, Format] = {
    "sharegpt": Format({"conversations", "chosen", "rejected"}, from_sharegpt),
    "stack-exchange": Format({"question", "response_j", "response_k"}, from_stack_exchange),
    "messages": Format({"chosen", "rejected"}, from_messages, lambda row: isinstance(row["chosen"], list)),
    "prompt": Format({"prompt", "chosen", "rejected"}, from_prompt, lambda row: isinstance(row["chosen"], str)),
    "hh": Format({"chosen", "rejected"}, from_transcript, _is_transcript),
}


def to_pair(row: object, file: str, line: int, format: str = "auto") -> Pair:
    """The pair in a row of `file` at `line`.

    Raises:
        RowRefused: the row holds no pair; with a reason code and what was expected.
    """
    if not isinstance(row, dict):
        raise RowRefused("wrong-type", f"expected an object, got {_kind(row)}")
    chosen, rejected = _reader(row, format)(row)
    return Pair.from_conversations(chosen, rejected, file, line)


def to_prompt(row: object) -> tuple[Turn, ...]:
    """The turns of a prompt: a text, a row with `prompt`, `messages` or `conversations`, or the prompt of a preference row.

    Assistant turns at the end of a conversation are left out, so that files of dialogues and of pairs can be used unchanged.

    Raises:
        RowRefused: the row holds no prompt; with a reason code and what was expected.
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
        raise RowRefused("no-prompt", f"{field!r} asks nothing: expected a user turn with text in it")
    return tuple(turns)


def _reader(row: Row, format: str) -> Callable[[Row], Conversations]:
    if format != "auto":
        known = FORMATS[format]
        if missing := sorted(known.fields - row.keys()):
            raise RowRefused("missing-field", f"format {format} needs {_listed(missing)}; the row has {_listed(row)}")
        return known.read
    for known in FORMATS.values():
        if known.fields <= row.keys() and known.fits(row):
            return known.read
    if "chosen" in row and "rejected" in row:
        if isinstance(row["chosen"], str):
            raise RowRefused("missing-field", "chosen and rejected are strings, and there is no 'prompt'")
        raise RowRefused("wrong-type", f"'chosen' must be text or a list of turns, got {_kind(row['chosen'])}")
    if any(known.fields & row.keys() for known in FORMATS.values()):
        raise RowRefused("missing-field", f"a pair needs both answers; the row has {_listed(row)}")
    raise RowRefused("unknown-format", f"no known format has the fields {_listed(row)}; formats: {', '.join(FORMATS)}")


# --- readers that the formats share ---


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise RowRefused("wrong-type", f"{field!r} must be text, got {_kind(value)}")
    if len(value) > MOST_ROW:
        raise RowRefused("too-large", f"{field!r} has {len(value):,} characters, expected {MOST_ROW:,} or fewer")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowRefused("bad-unicode", f"{field!r} holds a lone surrogate, which UTF-8 cannot encode") from None
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
