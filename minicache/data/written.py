"""Whether a chat template writes what the turns of a conversation say: a template can cut the thoughts out of every answer
(DeepSeek R1's), or have no branch for a role (Phi-4's for `tool`).

What a turn says is a list of parts: its thoughts, its text, its calls. Two checks find parts that a template drops. A *probe* of
the same shape, made of words that occur nowhere else, tells what the template drops of every such conversation; one probe serves
all rows of a shape. Then each part of the real conversation is looked for in the rendered text, because a template may look into
contents.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from minicache.data.parts import Part, calls_of, holds, marked, marked_tool, parts_of, shape_of, tool_name
from minicache.data.records import THOUGHTS, Context, Note, Turn
from minicache.data.template import Template
from minicache.errors import RowRefused

# Most shapes of conversations whose probes are kept.
MOST_SHAPES = 4096
LEFT_OUT = Note("left-out")
# Of a call, the entries that hold parts, and one that is always the same.
READ = ("function", "type", "name", "arguments")


class Written:
    """Checks the texts that one template renders. show: hidden text -> as it was typed, see `SpecialText`."""

    def __init__(self, template: Template, show: Callable[[str], str] = str) -> None:
        self.template, self.show = template, show
        self._dropped: dict[object, frozenset[tuple[int, str, str]]] = {}

    def check(self, text: str, turns: tuple[Turn, ...], context: Context, shared: int) -> list[Note]:
        """What the template leaves out of the rendered turns by design. shared: how many of them both sides share.

        Raises:
            RowRefused: it leaves out something that it may not.
        """
        dropped = self._dropped_by_shape(turns, context)
        notes: list[Note] = []
        for part in parts_of(turns):
            is_dropped = (part.turn, part.kind, part.key) in dropped
            if not part.text or (not is_dropped and holds(text, part.text, self.template.switches)):
                continue
            if not self._by_design(part, turns, shared):
                raise _refusal(part._replace(text=self.show(part.text)), turns[part.turn])
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
        shape = (tuple(map(shape_of, turns)), bool(context.tools), bool(context.documents), repr(context.arguments))
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
            return frozenset(self._dropped_alone(turns, context))
        return frozenset(_missing(probe, text))

    def _dropped_alone(self, turns: tuple[Turn, ...], context: Context) -> Iterator[tuple[int, str, str]]:
        """The parts that the template leaves out where one turn after the other is made of other words."""
        for at, turn in enumerate(turns):
            others = (*turns[:at], marked(turn, at), *turns[at + 1 :])
            try:
                text = self.template.render(others, context=context)
            except RowRefused:
                continue
            yield from (part for part in _missing(others, text) if part[0] == at)

    # --- keys and columns that the template does not read ---

    def _unread_keys(self, text: str, turns: tuple[Turn, ...], context: Context) -> list[Note]:
        """The keys of turns and calls, beside those that hold parts, that change nothing in the text."""
        owners = {key: "call" for turn in turns for call in calls_of(turn) for key in {**call, **call["function"]}}
        owners = {key: owner for key, owner in owners.items() if key not in READ}
        owners |= {key: "turn" for turn in turns for key in turn.more or ()}
        # The tools in a turn are the conversation's, see `context_of`.
        for key in ("content", "tool_calls", "tools" if context.tools else "", *THOUGHTS):
            owners.pop(key, None)
        unread = [*owners]
        if not unread or not self._is_without(unread, text, turns, context):
            unread = [key for key in owners if self._is_without([key], text, turns, context)]
        return [Note("unused", f"{key} of a {owners[key]}") for key in unread]

    def _is_without(self, keys: list[str], text: str, turns: tuple[Turn, ...], context: Context) -> bool:
        """Whether the text stays as it is without these keys of turns and calls."""
        try:
            return self.template.render(tuple(_without(turn, keys) for turn in turns), context=context) == text
        except RowRefused:
            return False

    def _unread_context(self, text: str, turns: tuple[Turn, ...], context: Context) -> list[Note]:
        """The template arguments that the template does not read.

        Raises:
            RowRefused: it does not write the tools or the documents.
        """
        tools = [marked_tool(tool, at) for at, tool in enumerate(context.tools or ())]
        for name, others in (("tools", {"tools": tools or None}), ("documents", {"documents": None})):
            other = replace(context, **others)
            if other == context:
                continue
            try:
                rendered = self.template.render(turns, context=other)
            except RowRefused:
                continue
            if rendered == text or not all(tool_name(tool) in rendered for tool in others.get("tools") or ()):
                own = f"; the tokenizer's own are named default, {', '.join(self.template.named)}"
                raise RowRefused(
                    "unused-field",
                    f"{name!r} is not written by the chat template; expected one that does (--chat-template FILE"
                    f"{own if self.template.named else ''}), or --ignore-fields {name}",
                )
        unread = [f"chat_template_kwargs.{name}" for name in sorted(context.arguments.keys() - self.template.variables)]
        unread += [f"{key} of a document" for key in self._unread_of_documents(text, turns, context)]
        return [Note("unused", name) for name in unread]

    def _unread_of_documents(self, text: str, turns: tuple[Turn, ...], context: Context) -> Iterator[str]:
        documents = [document for document in context.documents or () if isinstance(document, dict)]
        for key in dict.fromkeys(key for document in documents for key in document):
            bare = [{name: each for name, each in document.items() if name != key} for document in documents]
            try:
                if self.template.render(turns, context=replace(context, documents=bare)) == text:
                    yield key
            except RowRefused:
                continue


def _missing(turns: tuple[Turn, ...], text: str) -> Iterator[tuple[int, str, str]]:
    return ((part.turn, part.kind, part.key) for part in parts_of(turns) if part.text not in text)


def _without(turn: Turn, keys: list[str]) -> Turn:
    """A turn without these keys of it and of its calls."""

    def rest(value: Mapping[str, Any]) -> dict[str, Any]:
        return {key: each for key, each in value.items() if key in READ or key not in keys}

    more = {key: each for key, each in (turn.more or {}).items() if key not in keys}
    if "tool_calls" in more:
        more["tool_calls"] = [{**rest(call), "function": rest(call["function"])} for call in more["tool_calls"]]
    return replace(turn, more=more or None)


def _refusal(part: Part, turn: Turn) -> RowRefused:
    shown = part.text[:40] + ("…" if len(part.text) > 40 else "")
    if part.key in ("content", "tool_calls"):
        what = {"thought": "a thought", "call": "a call"}.get(part.kind, "its text")
        column = ", or --ignore-fields with the name of its column" if turn.role == "system" else ""
        return RowRefused(
            "template",
            f"the chat template does not write what the {turn.role} says: {what} is missing: {shown!r}; expected a template that "
            f"does (--chat-template){column}",
        )
    return RowRefused(
        "unused-field",
        f"the chat template does not write the {turn.role}'s {part.key!r} ({shown!r}); expected one that does "
        f"(--chat-template), or --ignore-fields {part.key}",
    )
