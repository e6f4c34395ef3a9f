"""Whether a chat template writes what the turns of a conversation say: a template can cut the thoughts out of every answer
(DeepSeek R1's), or have no branch for a role (Phi-4's for `tool`).

What a turn says is a list of parts: its thoughts, its text, its calls. Two checks find parts that a template drops. A *probe* of
the same shape, made of words that occur nowhere else, tells what the template drops of every such conversation; one probe serves
all rows of a shape. Then each part of the real conversation is looked for in the rendered text, because a template may look into
contents.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from markupsafe import escape

from minicache.data.records import THOUGHTS, Context, Note, Turn, texts_in
from minicache.data.template import Template
from minicache.errors import RowRefused

TAGS = re.compile(r"(</?think>)")
# Most shapes of conversations whose probes are kept.
MOST_SHAPES = 4096
LEFT_OUT = Note("left-out")


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
        for call in (turn.more or {}).get("tool_calls") or ():
            for text in _leaves([call["function"]["name"], _object(call["function"].get("arguments"))]):
                yield Part(at, "call", text.strip(), "tool_calls")


def _content_parts(at: int, turn: Turn) -> Iterator[Part]:
    if turn.role != "assistant" or "</think>" not in turn.content:
        yield Part(at, "text", turn.content.strip())
        return
    *thoughts, text = turn.content.split("</think>")
    for thought in thoughts:
        for piece in thought.split("<think>"):
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


def holds(text: str, part: str) -> bool:
    """Whether a rendered text holds a part: as it is, as JSON, as HTML, or with other whitespace."""
    if part in text:
        return True
    if (
        any(json.dumps(part, ensure_ascii=escaped)[1:-1] in text for escaped in (False, True))
        or str(escape(part)) in text
    ):
        return True
    return "".join(part.split()) in "".join(text.split())


class Written:
    """Checks the texts that one template renders."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self._dropped: dict[object, frozenset[tuple[int, str, str]]] = {}

    def check(self, text: str, turns: tuple[Turn, ...], context: Context, shared: int) -> list[Note]:
        """What the template leaves out of the rendered turns by design. shared: how many of them both sides share.

        Raises:
            RowRefused: it leaves out something that it may not.
        """
        dropped = self._dropped_by_shape(turns, context)
        notes: list[Note] = []
        for part in parts_of(turns):
            if not part.text or ((part.turn, part.kind, part.key) not in dropped and holds(text, part.text)):
                continue
            if not self._by_design(part, turns, shared):
                raise _refusal(part, turns[part.turn])
            notes = [LEFT_OUT]
        if any(turn.more for turn in turns):
            notes += self._unread_keys(text, turns, context)
        return notes + self._unread_context(text, turns, context)

    def _by_design(self, part: Part, turns: tuple[Turn, ...], shared: int) -> bool:
        """Whether templates leave this part out of an earlier turn on purpose: thoughts, or the text beside a call (Llama 3.1)."""
        turn = turns[part.turn]
        if part.kind == "thought":
            known = self._knows_tags if part.key == "content" else any(map(self.template.mentions, THOUGHTS))
            return known and any(later.role == "user" for later in turns[part.turn + 1 :])
        return part.kind == "text" and part.turn < shared and bool(turn.more and turn.more.get("tool_calls"))

    @cached_property
    def _knows_tags(self) -> bool:
        return "</think>" in self.template.source

    # --- probes ---

    def _dropped_by_shape(self, turns: tuple[Turn, ...], context: Context) -> frozenset[tuple[int, str, str]]:
        """Turn, kind and key of the parts that the template leaves out of every conversation of this shape."""
        shape = (tuple(map(_shape, turns)), bool(context.tools), bool(context.documents), repr(context.arguments))
        if shape not in self._dropped:
            if len(self._dropped) >= MOST_SHAPES:
                self._dropped.clear()
            self._dropped[shape] = self._probe(turns, context)
        return self._dropped[shape]

    def _probe(self, turns: tuple[Turn, ...], context: Context) -> frozenset[tuple[int, str, str]]:
        probe = tuple(marked(turn, at) for at, turn in enumerate(turns))
        try:
            text = self.template.render(probe, context=context)
        except RowRefused:
            # It demands something of the contents, which the real conversation has.
            return frozenset()
        return frozenset((part.turn, part.kind, part.key) for part in parts_of(probe) if part.text not in text)

    # --- keys and columns that the template does not read ---

    def _unread_keys(self, text: str, turns: tuple[Turn, ...], context: Context) -> list[Note]:
        """The keys of turns, beside those that hold parts, that change nothing in the text."""
        keys = {key: None for turn in turns for key in turn.more or ()}
        # The tools in a turn are the conversation's, see `_unread_context`.
        for key in ("content", "tool_calls", "tools" if context.tools else "", *THOUGHTS):
            keys.pop(key, None)
        return [Note("unused", f"{key} of a turn") for key in keys if self._is_without(key, text, turns, context)]

    def _is_without(self, key: str, text: str, turns: tuple[Turn, ...], context: Context) -> bool:
        """Whether the text stays as it is without a key of the turns."""
        bare = tuple(
            replace(turn, more={name: value for name, value in (turn.more or {}).items() if name != key})
            for turn in turns
        )
        try:
            return self.template.render(bare, context=context) == text
        except RowRefused:
            return False

    def _unread_context(self, text: str, turns: tuple[Turn, ...], context: Context) -> list[Note]:
        """The template arguments that the template does not read.

        Raises:
            RowRefused: it does not write the tools or the documents.
        """
        for name, bare in (("tools", replace(context, tools=None)), ("documents", replace(context, documents=None))):
            if bare == context:
                continue
            try:
                is_same = self.template.render(turns, context=bare) == text
            except RowRefused:
                is_same = False
            if is_same:
                raise RowRefused(
                    "unused-field",
                    f"{name!r} is not written by the chat template; expected one that does (--chat-template), or "
                    f"--ignore-fields {name}",
                )
        unread = context.arguments.keys() - self.template.variables
        return [Note("unused", f"chat_template_kwargs.{name}") for name in sorted(unread)]


def _refusal(part: Part, turn: Turn) -> RowRefused:
    shown = part.text[:40] + ("…" if len(part.text) > 40 else "")
    if part.key in ("content", "tool_calls"):
        what = {"thought": "a thought", "call": "a call"}.get(part.kind, "its text")
        return RowRefused(
            "template", f"the chat template does not write what the {turn.role} says: {what} is missing: {shown!r}"
        )
    return RowRefused(
        "unused-field",
        f"the chat template does not write the {turn.role}'s {part.key!r} ({shown!r}); expected one that does "
        f"(--chat-template), or --ignore-fields {part.key}",
    )


def _shape(turn: Turn) -> object:
    """What the markers of a probe depend on."""
    shape = TAGS.findall(turn.content) if turn.role == "assistant" and "think>" in turn.content else ()
    more = turn.more or {}
    calls = [type(call["function"].get("arguments")) for call in more.get("tool_calls") or ()]
    kinds = tuple((key, type(value)) for key, value in more.items())
    return turn.role, bool(turn.content.strip()), tuple(shape), kinds, tuple(calls)


def marked(turn: Turn, at: int, names: bool = True) -> Turn:
    """A turn of the same shape, made of words that occur nowhere else. names: whether calls have other names, too."""
    pieces = TAGS.split(turn.content) if turn.role == "assistant" else [turn.content]
    content = "\n".join(
        piece if TAGS.fullmatch(piece) else f"qx{at}c{number}xq" for number, piece in enumerate(pieces) if piece.strip()
    )
    if not turn.more:
        return Turn(turn.role, content)
    more = dict(turn.more)
    for key in THOUGHTS:
        if key in more:
            more[key] = _with_word(more[key], f"qx{at}{key}xq")
    if more.get("tool_calls"):
        more["tool_calls"] = [_marked_call(call, f"qx{at}f{n}xq", names) for n, call in enumerate(more["tool_calls"])]
    return Turn(turn.role, content, more)


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
    name = word if names else call["function"]["name"]
    return {**call, "function": {**call["function"], "name": name, "arguments": arguments}}
