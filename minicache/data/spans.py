"""Pair -> the text of each side and the spans of its characters that count in the loss.

Each side is rendered whole. The answer begins at the end of what its text shares with the prompt rendered with a generation
prompt; assistant turns are found between what the template writes around them.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from minicache.data.records import NO_CONTEXT, Context, Note, Pair, Turn
from minicache.data.tokenizers import ChatTokenizer
from minicache.data.written import Written, parts_of
from minicache.errors import RowRefused

EMPTY_THINK = "<think>\n\n</think>\n\n"

Span = tuple[int, int]  # characters, begin and end


class Side(NamedTuple):
    """A rendered side. spans: characters that count. begin: position where the side's own answer begins. hides: whether text of
    special tokens is hidden in it."""

    text: str
    spans: list[Span]
    begin: int
    hides: bool


class Frame(NamedTuple):
    """What a template writes around an answer: a header before it, a think block or "", a closing after it."""

    header: str
    think: str
    closing: str


@dataclass(frozen=True)
class Renderer:
    """Renders pairs. loss_on, think, special_text: as in `Encoder`."""

    tokenizer: ChatTokenizer
    loss_on: str
    think: str
    special_text: str

    def render(self, pair: Pair) -> tuple[list[Side], list[Note]]:
        """Both sides, and notes on parts of the row that no token stands for.

        Raises:
            RowRefused: the template cannot write these turns, or leaves out what one of them says.
        """
        special, notes = self.tokenizer.special_text, list(pair.notes)
        hidden = self._hidden(pair)
        hides = hidden != pair
        if (hides or self.special_text == "allow") and (found := special.first_in(pair)):
            notes.append(Note("special-text", found))
        opened = self._text(hidden.prompt, hidden.context, open_answer=True)
        sides = []
        for answer in (hidden.chosen, hidden.rejected):
            turns = hidden.prompt + answer
            text = self._text(turns, hidden.context)
            notes += self._written.check(text, turns, hidden.context, len(hidden.prompt))
            if hides:
                special.require_plain(text)
            spans, begin = self._counted(text, opened, hidden, turns)
            sides.append(Side(text, spans, begin, hides))
        return sides, notes

    def _text(self, turns: tuple[Turn, ...], context: Context = NO_CONTEXT, open_answer: bool = False) -> str:
        text = self.tokenizer.render(turns, open_answer, context)
        return text.replace(EMPTY_THINK, "") if self.think == "drop" else text

    @cached_property
    def _written(self) -> Written:
        return Written(self.tokenizer.chat)

    def _hidden(self, pair: Pair) -> Pair:
        """The pair with the text of special tokens hidden, unless it is to become these tokens."""
        if self.special_text == "allow":
            return pair
        special, refuse = self.tokenizer.special_text, self.special_text == "refuse"
        return replace(
            pair,
            prompt=special.hide(pair.prompt, refuse),
            chosen=special.hide(pair.chosen, refuse),
            rejected=special.hide(pair.rejected, refuse),
            opening=special.hide_all(pair.opening, "the beginning of an answer", refuse),
            context=special.hide_context(pair.context, refuse),
        )

    # --- what counts ---

    def _counted(self, text: str, opened: str, pair: Pair, turns: tuple[Turn, ...]) -> tuple[list[Span], int]:
        """The spans that count of a side, and where its own answer begins. opened: the prompt with a generation prompt."""
        answers = turns[len(pair.prompt) :]
        if self.loss_on == "response" or (self.loss_on == "answer" and len(answers) == 1):
            spans, own = [(self._boundary(text, opened, pair), len(text))], 0
        else:
            spans = self._assistant_spans(text, turns)
            own = sum(turn.role == "assistant" for turn in pair.prompt)
            if self.loss_on == "answer":
                spans, own = self._answer_spans(text, opened, pair, spans[own:]), 0
        if pair.opening:
            spans[own] = (_after_opening(text, spans[own], pair.opening, answers[0].content), spans[own][1])
        return spans, spans[own][0]

    def _boundary(self, text: str, opened: str, pair: Pair) -> int:
        """The position of the answer: the end of what the text shares with the prompt rendered with a generation prompt.

        Raises:
            RowRefused: the template renders the prompt differently once an answer follows.
        """
        prompt, context = pair.prompt, pair.context
        boundary = _shared_length(text, opened)
        if boundary < len(opened):
            # The "<" of an answer "<b>…" is not part of a "<think>" that only the generation prompt has.
            other = self._text((*prompt, Turn("assistant", "\x02answer\x02")), context)
            boundary = min(boundary, _shared_length(other, opened))
        if boundary < len(opened) and boundary < len(self._text(prompt, context)):
            raise RowRefused(
                "template", "the chat template writes the prompt's turns differently once an answer follows"
            )
        return boundary

    def _assistant_spans(self, text: str, turns: tuple[Turn, ...]) -> list[Span]:
        """The spans of the assistant's turns, found turn by turn, so that a header that a user typed is never taken for a real one.

        A span begins right after the turn's header (before a think block that the template adds) and ends after the turn's
        closing. The template may keep or trim whitespace around a content.

        Raises:
            RowRefused: the template changes an assistant turn.
        """
        frame = self._frame
        spans, position = [], 0
        for at, turn in enumerate(turns):
            if turn.role != "assistant":
                content = turn.content.strip()
                begin = text.find(content, position)
                position = begin + len(content) if begin >= 0 else position
                continue
            # Thoughts and calls stand beside the content.
            span = None if turn.more else _plain_span(text, turn, position, frame)
            if not span and (turn.more or "</think>" in turn.content or (at and turns[at - 1].role == "tool")):
                span = _span_of_parts(text, turn, position, frame)
            if not span:
                raise RowRefused("template", "the chat template rewrites an assistant turn; try --loss-on response")
            spans.append(span)
            position = span[1] - len(frame.closing)
        return spans

    def _answer_spans(self, text: str, opened: str, pair: Pair, spans: list[Span]) -> list[Span]:
        """The spans of the side's own assistant turns, each without what a generation prompt puts before it."""
        tail = opened[opened.rfind(self._frame.header) + len(self._frame.header) :] if self._frame.header else ""
        later = [(begin + _opened_length(text, begin, tail), end) for begin, end in spans[1:]]
        return [(self._boundary(text, opened, pair), spans[0][1]), *later]

    @cached_property
    def _frame(self) -> Frame:
        user, assistant = Turn("user", "\x01question\x01"), Turn("assistant", "\x02answer\x02")
        before, _, closing = self._text((user, assistant)).rpartition(assistant.content)
        header, tag, rest = before.rpartition(user.content)[2].partition("<think>")
        return Frame(header.removeprefix(closing), tag + rest, closing)


def _shared_length(left: str, right: str) -> int:
    """Length of the common beginning of two strings, by bisection: comparing each character took a sixth of the encoding time."""
    least, most = 0, min(len(left), len(right))
    while least < most:
        middle = (least + most + 1) // 2
        if left[least:middle] == right[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _plain_span(text: str, turn: Turn, position: int, frame: Frame) -> Span | None:
    """The span of an assistant turn whose text is exactly its content."""
    start = text.find(frame.header, position)
    begin = start + len(frame.header)
    end = _end_of(turn.content.strip(), text, begin, frame.think, frame.closing) if start >= 0 else -1
    return (begin, end + len(frame.closing)) if end >= 0 else None


def _end_of(content: str, text: str, begin: int, think: str, closing: str) -> int:
    """Position in `text` of the closing that ends the answer starting at `begin`; -1 unless the answer is exactly `content`."""
    for origin in (begin + len(think), begin):
        at = text.find(content, origin)
        end = text.find(closing, at + len(content))
        alone = text[begin:at].strip() in ("", think.strip()) and not text[at + len(content) : end].strip()
        if at >= 0 and end >= 0 and alone:
            return end
    return -1


def _span_of_parts(text: str, turn: Turn, position: int, frame: Frame) -> Span | None:
    """The span of an assistant turn that has thoughts or calls, or follows a tool's turn: around the parts that are written."""
    found = [
        (at, at + len(part.text))
        for part in parts_of([turn])
        if part.text and (at := text.find(part.text, position)) >= 0
    ]
    if not found:
        return None
    first, last = min(begin for begin, _ in found), max(end for _, end in found)
    start = text.find(frame.header, position)
    begin = start + len(frame.header)
    end = text.find(frame.closing, last)
    if end < 0:
        return None
    # After a tool's turn a template may write no header, or another one.
    return (begin if start >= 0 and begin <= first else first, end + len(frame.closing))


def _opened_length(text: str, begin: int, tail: str) -> int:
    """How many of the characters at `begin` are the end of a generation prompt: all of `tail`, or the tag that it begins with."""
    if text.startswith(tail, begin):
        return len(tail)
    tag = tail[: tail.find("\n") + 1]
    return len(tag) if tag.startswith("<") and text.startswith(tag, begin) else 0


def _after_opening(text: str, span: Span, opening: str, content: str) -> int:
    """The position in the answer's span where its opening ends.

    Raises:
        RowRefused: the template does not write the answer as it is.
    """
    at = text.find(content.strip(), span[0])
    if at < 0 or at > span[1]:
        raise RowRefused("template", "the chat template cannot go on with a prompt that ends in an assistant's turn")
    return at + len(opening) - (len(content) - len(content.lstrip()))
