"""Where an assistant's turn lies in a rendered conversation, found by rendering it once more with other words in that turn.

What differs between the two texts is what the turn says, whatever it is made of (thoughts, calls) and however short: no text is
searched for. It takes several renderings, so that plain turns are found by their text instead.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from minicache.data.parts import calls_of, marked
from minicache.data.records import Context, Turn
from minicache.errors import RowRefused

Span = tuple[int, int]  # characters, begin and end


class Render(Protocol):
    """Turns -> text, with a generation prompt at its end if `open_answer` is set."""

    def __call__(self, turns: tuple[Turn, ...], context: Context, open_answer: bool = False) -> str: ...


@dataclass(frozen=True)
class AnswerFinder:
    """Finds the assistant's turns in `text`, rendered from `turns`. header: what the template writes before a plain answer."""

    render: Render
    text: str
    turns: tuple[Turn, ...]
    context: Context
    header: str

    def span(self, at: int, position: int) -> Span | None:
        """From the end of the header of turn `at` to the end of its closing; None where that cannot be found.

        position: where the turn before it ends. Where there is no header, as after a tool's turn in some templates, the span
        begins where the generation prompt ends.
        """
        try:
            # A tool's turn may repeat the name of the call (gpt-oss).
            changed = (*self.turns[:at], marked(self.turns[at], at, names=False), *self.turns[at + 1 :])
            first, last = _difference(self.text, self.render(changed, self.context))
            start = self.text.rfind(self.header, position, first) if self.header else -1
            begin = start + len(self.header) if start >= 0 else self._opened(at)
            if begin > first and calls_of(self.turns[at]):
                # What precedes the words of a call, such as its name, counts too.
                return None
            begin = min(begin, first)
            closing = next(each for each in self._closings(at, changed) if self.text.startswith(each, last))
        except (RowRefused, StopIteration):
            return None
        return (begin, last + len(closing)) if position <= begin <= last else None

    def _closings(self, at: int, changed: tuple[Turn, ...]) -> Iterator[str]:
        """What the template writes after turn `at` where it is the last one, and where another answer follows (gpt-oss).

        changed: the turns with other words in this one.
        """
        yield self._after(self.turns[: at + 1], changed[: at + 1])
        before = self.turns[:at]
        prompt = self.render(before, self.context, open_answer=True).removeprefix(self.render(before, self.context))
        yield self._after(self.turns[: at + 1], changed[: at + 1], open_answer=True).removesuffix(prompt)

    def _after(self, turns: tuple[Turn, ...], changed: tuple[Turn, ...], open_answer: bool = False) -> str:
        text, other = (self.render(each, self.context, open_answer) for each in (turns, changed))
        return text[_difference(text, other)[1] :]

    def _opened(self, at: int) -> int:
        """Where the generation prompt of turn `at` ends; the end of the text if the turns before it are written differently."""
        before = self.turns[:at]
        shared = shared_length(self.text, self.render(before, self.context, open_answer=True))
        return shared if shared >= len(self.render(before, self.context)) else len(self.text)


def end_of_opening(
    text: str, turns: tuple[Turn, ...], at: int, opening: str, render: Callable[[tuple[Turn, ...]], str]
) -> int:
    """The position in the text where the opening of answer `at` ends.

    Raises:
        RowRefused: the template does not write the answer as it is.
    """
    turn, end = turns[at], len(text)
    rest = marked(Turn("assistant", turn.content[len(opening) :]), at).content or "q"
    # The answer may begin with the same sign as one of these words.
    for other in (rest, rest.replace("q", "z")):
        changed = (*turns[:at], Turn(turn.role, opening + other, turn.more), *turns[at + 1 :])
        end = min(end, shared_length(text, render(changed)))
    if not text[:end].rstrip().endswith(opening.strip()):
        raise RowRefused("template", "the chat template cannot go on with a prompt that ends in an assistant's turn")
    return end


def _difference(text: str, other: str) -> Span:
    """Begin and end of the part of `text` that `other` has not."""
    first = shared_length(text, other)
    return first, len(text) - shared_length(text[first:][::-1], other[first:][::-1])


def shared_length(left: str, right: str) -> int:
    """Length of the common beginning of two strings, by bisection: comparing each character took a sixth of the encoding time."""
    least, most = 0, min(len(left), len(right))
    while least < most:
        middle = (least + most + 1) // 2
        if left[least:middle] == right[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
