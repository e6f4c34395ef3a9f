"""Pair -> the text of each side and the spans of its characters that count in the loss.

Each side is rendered whole. The answer begins at the end of what its text shares with the prompt rendered with a generation
prompt; assistant turns are found between what the template writes around them.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from minicache.data.differences import AnswerFinder, Span, end_of_opening, shared_length
from minicache.data.records import NO_CONTEXT, Context, Note, Pair, Turn
from minicache.data.tokenizers import ChatTokenizer
from minicache.data.written import Written
from minicache.errors import RowRefused

EMPTY_THINK = "<think>\n\n</think>\n\n"


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
            whole = self.tokenizer.render(turns, context=hidden.context)
            notes += self._written.check(whole, turns, hidden.context, len(hidden.prompt))
            text = self._without_empty_thoughts(whole)
            if hides:
                special.require_plain(text)
            spans, begin = self._counted(text, opened, hidden, turns)
            sides.append(Side(text, spans, begin, hides))
        return sides, notes

    def _text(self, turns: tuple[Turn, ...], context: Context = NO_CONTEXT, open_answer: bool = False) -> str:
        return self._without_empty_thoughts(self.tokenizer.render(turns, open_answer, context))

    def _without_empty_thoughts(self, text: str) -> str:
        return text.replace(EMPTY_THINK, "") if self.think == "drop" else text

    @cached_property
    def _written(self) -> Written:
        return Written(self.tokenizer.chat, self.tokenizer.special_text.show)

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
            spans = self._assistant_spans(text, turns, pair.context)
            own = sum(turn.role == "assistant" for turn in pair.prompt)
            if self.loss_on == "answer":
                spans, own = self._answer_spans(text, opened, pair, spans[own:]), 0
        if pair.opening:
            at, context = len(pair.prompt), pair.context
            end = end_of_opening(text, turns, at, pair.opening, lambda turns: self._text(turns, context))
            spans[own] = (max(end, spans[own][0]), spans[own][1])
        return spans, spans[own][0]

    def _boundary(self, text: str, opened: str, pair: Pair) -> int:
        """The position of the answer: the end of what the text shares with the prompt rendered with a generation prompt.

        Raises:
            RowRefused: the template renders the prompt differently once an answer follows.
        """
        prompt, context = pair.prompt, pair.context
        boundary = shared_length(text, opened)
        if boundary < len(opened):
            # The "<" of an answer "<b>…" is not part of a "<think>" that only the generation prompt has.
            other = self._text((*prompt, Turn("assistant", "\x02answer\x02")), context)
            boundary = min(boundary, shared_length(other, opened))
        if boundary < len(opened) and boundary < len(self._text(prompt, context)):
            raise RowRefused(
                "template", "the chat template writes the prompt's turns differently once an answer follows"
            )
        return boundary

    def _assistant_spans(self, text: str, turns: tuple[Turn, ...], context: Context) -> list[Span]:
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
                begin = -1 if turn.role == "system" and not self._keeps_order else text.find(content, position)
                position = begin + len(content) if begin >= 0 else position
                continue
            span = None if turn.more else _plain_span(text, turn, position, frame)
            if not span:
                span = AnswerFinder(self._text, text, turns, context, frame.header).span(at, position)
            if not span:
                raise RowRefused("template", "the chat template rewrites an assistant turn; try --loss-on response")
            spans.append(span)
            position = max(position, span[1] - len(frame.closing))
        return spans

    @cached_property
    def _keeps_order(self) -> bool:
        """Whether the template writes a system turn before all others (Mistral's goes to the last question)."""
        talk = ("system", "user", "assistant", "user", "assistant")
        try:
            text = self._text(tuple(Turn(role, f"\x01{at}\x01") for at, role in enumerate(talk)))
        except RowRefused:
            return True
        return -1 < text.find("\x010\x01") < text.find("\x011\x01")

    def _answer_spans(self, text: str, opened: str, pair: Pair, spans: list[Span]) -> list[Span]:
        """The spans of the side's own assistant turns, each without what a generation prompt puts before it."""
        header, prompt = self._frame.header, opened.removeprefix(self._text(pair.prompt, pair.context))
        if prompt and prompt in header:
            # What follows the generation prompt in a header is the answer's (gpt-oss).
            written = header.rpartition(prompt)[2]
            later = [(begin - len(written) * text.endswith(written, 0, begin), end) for begin, end in spans[1:]]
        else:
            tail = opened[opened.rfind(header) + len(header) :] if header in opened else ""
            later = [(begin + _opened_length(text, begin, tail), end) for begin, end in spans[1:]]
        return [(self._boundary(text, opened, pair), spans[0][1]), *later]

    @cached_property
    def _frame(self) -> Frame:
        user, assistant = Turn("user", "\x01question\x01"), Turn("assistant", "\x02answer\x02")
        before, _, closing = self._text((user, assistant)).rpartition(assistant.content)
        header, tag, rest = before.rpartition(user.content)[2].partition("<think>")
        return Frame(header.removeprefix(closing), tag + rest, closing)


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


def _opened_length(text: str, begin: int, tail: str) -> int:
    """How many of the characters at `begin` are the end of a generation prompt: all of `tail`, or the tag that it begins with."""
    if text.startswith(tail, begin):
        return len(tail)
    tag = tail[: tail.find("\n") + 1]
    return len(tag) if tag.startswith("<") and text.startswith(tag, begin) else 0
