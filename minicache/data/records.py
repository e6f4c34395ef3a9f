"""Turn, Context and Pair: a preference as messages, before any tokenizer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minicache.errors import RowRefused

ROLES = ("system", "user", "assistant", "tool")
# Keys of a message with what the model thought before it answered.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class Note(NamedTuple):
    """What became of a part of a row that is not refused. kind: see `minicache.reports.notes`. detail: such as a column."""

    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    role: one of ROLES. content: the text, "" without any. more: the message's other keys as the template gets them
    (`tool_calls`, `reasoning_content`, …); `content` stands among them where the message says null, or has a value of which the
    text is JSON.
    """

    role: str
    content: str
    more: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def message(self) -> dict[str, Any]:
        """The message as a template gets it."""
        return {"role": self.role, "content": self.content, **(self.more or {})}

    @property
    def says_nothing(self) -> bool:
        """Whether there is neither text nor a call in it."""
        return not self.content.strip() and not (self.more and self.more.get("tool_calls"))


@dataclass(frozen=True)
class Context:
    """What a template gets beside the messages.

    tools: schemas of functions. documents: what to answer from. arguments: the template's own, such as `enable_thinking`.
    """

    tools: list[Any] | None = None
    documents: list[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


NO_CONTEXT = Context()


@dataclass(frozen=True)
class Pair:
    """Two continuations of one prompt.

    prompt: the turns that both sides share. opening: text that both first answers begin with and that belongs to the prompt.
    chosen, rejected: the turns that follow, the opening included; each begins with an assistant turn.
    file, line: origin of the pair: the file as the user named it; the line, or the row of a JSON array or parquet file, from 1.
    context: what the template gets beside the turns. notes: parts of the row that are not used, and the like.
    """

    prompt: tuple[Turn, ...]
    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...]
    file: str = ""
    line: int = 0
    opening: str = ""
    context: Context = field(default=NO_CONTEXT, hash=False)
    notes: tuple[Note, ...] = field(default=(), compare=False)

    @property
    def characters(self) -> int:
        """Characters of both sides together, the prompt counted on each."""
        return sum(
            len(turn.content) + _characters(turn.more)
            for turns in (self.prompt * 2, self.chosen, self.rejected)
            for turn in turns
        ) + 2 * _characters((self.context.tools, self.context.documents))

    @classmethod
    def from_conversations(cls, chosen: list[Turn], rejected: list[Turn], file: str = "", line: int = 0) -> "Pair":
        """Split two whole conversations at the first turn in which they differ.

        Raises:
            RowRefused: nothing differs, there is no prompt, a side has no answer, or the sides differ before an answer begins.
        """
        if not chosen or not rejected:
            raise RowRefused("empty-answer", f"{'chosen' if not chosen else 'rejected'} has no turns")
        if chosen == rejected:
            raise RowRefused("identical", "chosen and rejected are the same text")
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if not shared and chosen[0].role == rejected[0].role == "assistant":
            raise RowRefused("missing-field", "there is no prompt: nothing precedes the answers")
        for name, turns in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
            _require_answer(name, turns)
        prompt, own, other = (tuple(turns) for turns in (chosen[:shared], chosen[shared:], rejected[shared:]))
        return cls(prompt=prompt, chosen=own, rejected=other, file=file, line=line)


def _require_answer(name: str, turns: list[Turn]) -> None:
    """Raises RowRefused: these turns, which follow the shared prompt, are no answer."""
    if all(turn.says_nothing for turn in turns if turn.role == "assistant"):
        raise RowRefused("empty-answer", f"{name} has no answer of its own")
    if turns[0].role != "assistant":
        raise RowRefused("prompts-differ", f"the sides differ first in a {turns[0].role} turn, not in an answer")
    if turns[-1].says_nothing or turns[-1].role != "assistant":
        raise RowRefused("empty-answer", f"{name} does not end in an answer")


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, "", [] and {}, but neither 0 nor false."""
    return value in (None, "", [], {})


def is_blank(value: object) -> bool:
    """As `is_empty`, of the JSON text of such a value too, such as the `"[]"` that LLaMA-Factory's rows hold for no tools."""
    return is_empty(value) or (isinstance(value, str) and value.strip() in ("", "null", '""', "[]", "{}"))


def texts_in(value: object) -> Iterator[str]:
    """Every text in a JSON value, the names of its objects' entries included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield str(name)
            yield from texts_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_in(each)


def _characters(value: object) -> int:
    return sum(map(len, texts_in(value))) if value else 0
