"""What the turns of a conversation say, part by part: thoughts, text, calls; and turns of the same shape in other words."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from markupsafe import escape

from minicache.data.records import THOUGHTS, Turn, texts_in

TAGS = re.compile(r"(</?think>)")


class Part(NamedTuple):
    """Something that a turn says. turn: its index. kind: "thought", "text" or "call". key: of the message."""

    turn: int
    kind: str
    text: str
    key: str = "content"


def parts_of(turns: Iterable[Turn]) -> Iterator[Part]:
    """What the turns say, part by part."""
    for at, turn in enumerate(turns):
        yield from _content_parts(at, turn)
        for key in THOUGHTS if turn.more else ():
            for text in texts_in((turn.more or {}).get(key)):
                yield Part(at, "thought", text.strip(), key)
        for call in calls_of(turn):
            for text in _leaves([call["function"]["name"], _object(call["function"].get("arguments"))]):
                yield Part(at, "call", text.strip(), "tool_calls")


def calls_of(turn: Turn) -> list[dict[str, Any]]:
    """The calls of a turn."""
    return (turn.more or {}).get("tool_calls") or []


def _content_parts(at: int, turn: Turn) -> Iterator[Part]:
    if turn.role != "assistant" or "</think>" not in turn.content:
        yield Part(at, "text", turn.content.strip())
        return
    *thoughts, text = turn.content.split("</think>")
    for thought in thoughts:
        before, tag, inner = thought.partition("<think>")
        # Without a tag: the generation prompt may have opened the thought.
        yield Part(at, "text" if tag else "thought", before.strip())
        for piece in inner.split("<think>"):
            yield Part(at, "thought", piece.strip())
    yield Part(at, "text", text.strip())


def _leaves(value: Any) -> Iterator[str]:
    """Every text and number in a JSON value, and the names of its entries."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield name
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value if isinstance(value, str) else json.dumps(value)


def _object(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def holds(text: str, part: str, switches: Iterable[str] = ()) -> bool:
    """Whether a rendered text holds a part: as it is, as JSON, as HTML, or with other whitespace.

    switches: words that the template may take out of a part, see `Template.switches`.
    """
    escaped = (json.dumps(part, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))
    if part in text or any(each in text for each in escaped) or str(escape(part)) in text:
        return True
    bare = "".join(text.split())
    found = "|".join(re.escape(switch) for switch in switches if switch in part)
    return all("".join(piece.split()) in bare for piece in (re.split(found, part) if found else [part]))


# --- other words in the same shape ---


def shape_of(turn: Turn) -> object:
    """What the words of `marked` depend on."""
    shape = TAGS.findall(turn.content) if turn.role == "assistant" and "think>" in turn.content else ()
    if not turn.more:
        return turn.role, bool(turn.content.strip()), tuple(shape)
    calls = tuple(type(call["function"].get("arguments")) for call in calls_of(turn))
    kinds = tuple((key, type(value)) for key, value in turn.more.items())
    return turn.role, bool(turn.content.strip()), tuple(shape), kinds, calls, _thoughts(turn)


def marked(turn: Turn, at: int, names: bool = True) -> Turn:
    """A turn of the same shape, made of words that occur nowhere else. names: whether calls have other names, too."""
    pieces = TAGS.split(turn.content) if turn.role == "assistant" else [turn.content]
    content = "\n".join(
        piece if TAGS.fullmatch(piece) else f"qx{at}c{number}xq" for number, piece in enumerate(pieces) if piece.strip()
    )
    if not turn.more:
        return Turn(turn.role, content)
    # not a content that is a value: the words take its place
    more = {key: value for key, value in turn.more.items() if key != "content" or value is None}
    for key, number in _thoughts(turn):
        more[key] = _with_word(more[key], f"qx{at}t{number}xq")
    if more.get("tool_calls"):
        more["tool_calls"] = [_marked_call(call, f"qx{at}f{n}xq", names) for n, call in enumerate(more["tool_calls"])]
    return Turn(turn.role, content, more)


def _thoughts(turn: Turn) -> tuple[tuple[str, int], ...]:
    """The keys with thoughts, and the number of each thought: the same one under two names has one number."""
    more = turn.more or {}
    keys = [key for key in THOUGHTS if key in more]
    return tuple((key, [more[each] for each in keys].index(more[key])) for key in keys)


def _with_word(value: Any, word: str) -> Any:
    """A JSON value of the same shape with this word in place of all texts."""
    if isinstance(value, dict):
        return {name: _with_word(each, word) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_word(each, word) for each in value]
    return word if isinstance(value, str) else value


def _marked_call(call: dict[str, Any], word: str, names: bool) -> dict[str, Any]:
    arguments: Any = {word + "k": word + "v"}
    if isinstance(call["function"].get("arguments"), str):
        arguments = json.dumps(arguments)
    # No part of the other words.
    name = word + "n" if names else call["function"]["name"]
    return {**call, "function": {**call["function"], "name": name, "arguments": arguments}}


def tool_name(tool: Any) -> str:
    """The name of a tool's function, "" without any."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def is_bare(tool: Any) -> bool:
    """Whether a tool is a function's name, description and parameters, without {type, function} around them."""
    return isinstance(tool, dict) and "name" in tool and not {"type", "function"} & tool.keys()


def marked_tool(tool: Any, at: int) -> Any:
    """A tool with a name that occurs nowhere else."""
    if not tool_name(tool):
        return tool
    function = {**tool.get("function", tool), "name": f"qxt{at}xq"}
    return {**tool, "function": function} if "function" in tool else function
