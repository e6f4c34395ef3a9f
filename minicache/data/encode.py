"""Pair -> EncodedPair: rendering, the boundary between prompt and answer, truncation, loss mask.

Each side is rendered and tokenized *whole*, and the boundary is found by the characters that tokens span: tokenizing prompt
and answer apart gives other ids than the model sees whenever a token crosses the boundary. A token that reaches past
the boundary belongs to the answer.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from minicache.data.records import Pair, Turn
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import RowRefused
from minicache.pairs import EncodedPair, Ints

EMPTY_THINK = "<think>\n\n</think>\n\n"
CHUNK = 128  # pairs tokenized in one call: enough to keep all cores of the tokenizers library busy

R = TypeVar("R")
Span = tuple[int, int]  # characters, begin and end


@dataclass(frozen=True)
class Encoder:
    """Turns pairs into token ids.

    max_length: tokens a side may have. truncate: 'right' cuts the end of a side that is longer, 'left' the beginning of the
    prompt (as much on both sides) and then the end, 'refuse' refuses the row. loss_on: which tokens count, 'response'
    (all after the shared prompt turns) or 'assistant' (every assistant turn, its closing token included). think: 'drop' takes
    out every empty think block; MiniMind's third generation does so by chance. special_text: what an `<|im_end|>` in a content
    is, 'plain' text, a reason to 'refuse' the row, or the special token itself ('allow').
    """

    tokenizer: ChatTokenizer
    max_length: int
    truncate: str = "right"
    loss_on: str = "response"
    think: str = "keep"
    special_text: str = "plain"

    def encode_all(
        self, rows: Iterable[Pair | RowRefused], file: int
    ) -> Iterator[tuple[EncodedPair, bool] | RowRefused]:
        """In order, for each row: the encoded pair and whether it was truncated, or the refusal."""
        rows = iter(rows)
        while chunk := list(islice(rows, CHUNK)):
            rendered = [row if isinstance(row, RowRefused) else _try(row, self._render, row) for row in chunk]
            texts = [text for item in rendered if not isinstance(item, RowRefused) for text, _, _ in item]
            encoded = iter(self.tokenizer.encode(texts, hides=self.special_text != "allow"))
            for row, item in zip(chunk, rendered, strict=True):
                if isinstance(item, RowRefused):
                    yield item
                    continue
                assert isinstance(row, Pair)
                sides = [(*next(encoded), spans, begin) for _, spans, begin in item]
                yield _try(row, self._assemble, sides, (file, row.line))

    def encode(self, pair: Pair, file: int = 0) -> tuple[EncodedPair, bool]:
        """One pair.

        Raises:
            RowRefused: it has nothing to learn from, or does not fit.
        """
        (result,) = self.encode_all([pair], file)
        if isinstance(result, RowRefused):
            raise result
        return result

    def _text(self, turns: tuple[Turn, ...], open_answer: bool = False) -> str:
        text = self.tokenizer.render(turns, open_answer)
        return text.replace(EMPTY_THINK, "") if self.think == "drop" else text

    def _render(self, pair: Pair) -> list[tuple[str, list[Span], int]]:
        """Of each side: its text, the spans of characters that count, and where its own answer begins."""
        sides = []
        prompt, special = self._hidden(pair.prompt), self.tokenizer.special_text
        for answer in (pair.chosen, pair.rejected):
            turns, earlier = prompt + self._hidden(answer), 0
            text = self._text(turns)
            if self.special_text != "allow" and special.is_in(text):
                special.require_plain(text)
            if self.loss_on == "assistant":
                spans = self._assistant_spans(text, turns)
                earlier = sum(turn.role == "assistant" for turn in prompt)
            else:
                spans = [(self._boundary(text, prompt), len(text))]
            sides.append((text, spans, spans[earlier][0]))
        return sides

    def _hidden(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if self.special_text == "allow":
            return turns
        return self.tokenizer.special_text.hide(turns, refuse=self.special_text == "refuse")

    def _boundary(self, text: str, prompt: tuple[Turn, ...]) -> int:
        """Where the answer begins: as far as the whole text agrees with the prompt opened for an answer."""
        opened = self._text(prompt, open_answer=True)
        boundary = _shared_length(text, opened)
        if boundary < len(opened):  # an answer "<b>…" agrees with a "<think>" that only a generation prompt has
            other = self._text((*prompt, Turn("assistant", "\x02answer\x02")))
            boundary = min(boundary, _shared_length(other, opened))
        if boundary < len(opened) and boundary < len(self._text(prompt)):
            raise RowRefused("template", "the chat template writes the prompt's turns otherwise once an answer follows")
        return boundary

    def _assistant_spans(self, text: str, turns: tuple[Turn, ...]) -> list[Span]:
        """What the assistant says, found turn by turn, so that a header typed by a user is never taken for one.

        A turn's span begins right after the header that opens it (before a think block that the template adds) and ends
        after what closes it. Whitespace around a content is the template's to keep or to trim.
        """
        header, think, closing = self._frame
        spans, position = [], 0
        for turn in turns:
            content = turn.content.strip()
            if turn.role != "assistant":
                begin = text.find(content, position)
                position = begin + len(content) if begin >= 0 else position
                continue
            start = text.find(header, position)
            begin = start + len(header)
            position = -1 if start < 0 else _end_of(content, text, begin, think, closing)
            if position < 0:
                raise RowRefused("template", "the chat template rewrites an assistant turn; try --loss-on response")
            spans.append((begin, position + len(closing)))
        return spans

    @cached_property
    def _frame(self) -> tuple[str, str, str]:
        """What the template writes before an answer: its header, and a think block if any; and after it."""
        user, assistant = Turn("user", "\x01question\x01"), Turn("assistant", "\x02answer\x02")
        before, _, closing = self._text((user, assistant)).rpartition(assistant.content)
        header, tag, rest = before.rpartition(user.content)[2].partition("<think>")
        return header.removeprefix(closing), tag + rest, closing

    def _assemble(
        self, sides: list[tuple[Ints, Ints, list[Span], int]], source: tuple[int, int]
    ) -> tuple[EncodedPair, bool]:
        ids = [tokens for tokens, _, _, _ in sides]
        masks = [_mask(offsets, spans) for _, offsets, spans, _ in sides]
        for name, mask in zip(("chosen", "rejected"), masks, strict=True):
            if not mask.any():
                raise RowRefused("empty-answer", f"{name} has no token that counts")
        longest = max(len(tokens) for tokens in ids)
        cut = 0
        if longest > self.max_length:
            if self.truncate == "refuse":
                raise RowRefused("too-long", f"{longest} tokens; --max-length is {self.max_length}")
            if self.truncate == "left":
                prompts = [int((offsets[:, 1] > begin).argmax()) for _, offsets, _, begin in sides]  # tokens of them
                cut = min(longest - self.max_length, *prompts)
        window = slice(cut, cut + self.max_length)
        ids, masks = [tokens[window] for tokens in ids], [mask[window] for mask in masks]
        for name, mask in zip(("chosen", "rejected"), masks, strict=True):
            if len(mask):
                mask[0] = 0  # nothing precedes the first token, so nothing predicts it
            if not mask.any():
                raise RowRefused(
                    "truncated-away",
                    f"{name} has no answer left within --max-length {self.max_length} (the longer side has {longest} tokens)",
                )
        if np.array_equal(ids[0], ids[1]) and np.array_equal(masks[0], masks[1]):
            raise RowRefused("identical", f"the sides are the same tokens within --max-length {self.max_length}")
        return EncodedPair.join(ids[0], masks[0], ids[1], masks[1], source), longest > self.max_length


def _try(pair: Pair, step: Callable[..., R], *arguments: Any) -> R | RowRefused:
    """A step's result, or its refusal as a value, so that one bad row does not end a batch."""
    try:
        return step(*arguments)
    except RowRefused as refusal:
        refusal.line = pair.line
        return refusal


def _shared_length(left: str, right: str) -> int:
    """Characters that two strings begin with alike, found by halving: comparing one by one took a sixth of all encoding."""
    least, most = 0, min(len(left), len(right))
    while least < most:
        middle = (least + most + 1) // 2
        if left[least:middle] == right[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _end_of(content: str, text: str, begin: int, think: str, closing: str) -> int:
    """Where the closing stands in `text` that ends what is said from `begin`, if that is just `content`; else -1."""
    for origin in (begin + len(think), begin):
        at = text.find(content, origin)
        end = text.find(closing, at + len(content))
        alone = text[begin:at].strip() in ("", think.strip()) and not text[at + len(content) : end].strip()
        if at >= 0 and end >= 0 and alone:
            return end
    return -1


def _mask(offsets: Ints, spans: list[Span]) -> np.ndarray:
    """(n,) uint8: 1 for each token that spans a character of a counted span."""
    mask = np.zeros(len(offsets), np.uint8)
    for begin, end in spans:
        mask |= ((offsets[:, 1] > begin) & (offsets[:, 0] < end)).astype(np.uint8)
    return mask
