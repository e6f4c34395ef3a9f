"""Pair -> EncodedPair: rendering, the boundary between prompt and answer, truncation, loss mask.

Each side is rendered and tokenized *whole*, and the boundary is found from the character spans of the tokens: whenever a
token crosses the boundary, tokenizing prompt and answer apart would give other ids than the model sees. A token that reaches
past the boundary belongs to the answer.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from minicache.data.records import Pair, Turn
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import RowRefused
from minicache.pairs import EncodedPair, Ints

EMPTY_THINK = "<think>\n\n</think>\n\n"
# Pairs tokenized in one call: enough for the tokenizers library to keep all cores busy.
CHUNK = 128
# Characters tokenized in one call, roughly: the call takes about fifty bytes of memory for each.
MOST_CHARACTERS = 2**24

R = TypeVar("R")
Span = tuple[int, int]  # characters, begin and end


@dataclass(frozen=True)
class Encoder:
    """Turns pairs into token ids.

    max_length: most tokens of a side.
    truncate: 'right' cuts the end of a longer side; 'left' cuts the beginning of the prompt, equally on both sides, and then the
        end; 'refuse' refuses the row.
    loss_on: which tokens count: 'response' (all after the shared prompt turns) or 'assistant' (every assistant turn with its
        closing token).
    think: 'drop' removes every empty think block (MiniMind 3 removes them at random), 'keep' leaves them.
    special_text: how an `<|im_end|>` in a content is treated: as 'plain' text, as a reason to 'refuse' the row, or as the special
        token itself ('allow').
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
        """For each row, in order: the encoded pair and whether it was truncated, or the refusal."""
        for chunk in _chunks(rows):
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
        """The encoded pair and whether it was truncated.

        Raises:
            RowRefused: the pair has nothing to learn from, or does not fit.
        """
        (result,) = self.encode_all([pair], file)
        if isinstance(result, RowRefused):
            raise result
        return result

    def _text(self, turns: tuple[Turn, ...], open_answer: bool = False) -> str:
        text = self.tokenizer.render(turns, open_answer)
        return text.replace(EMPTY_THINK, "") if self.think == "drop" else text

    def _render(self, pair: Pair) -> list[tuple[str, list[Span], int]]:
        """For each side: the text, the spans of characters that count, and the position where the side's own answer begins."""
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
        """The position of the answer: the end of what the text shares with the prompt rendered with a generation prompt.

        Raises:
            RowRefused: the template renders the prompt differently once an answer follows.
        """
        opened = self._text(prompt, open_answer=True)
        boundary = _shared_length(text, opened)
        if boundary < len(opened):
            # The "<" of an answer "<b>…" is not part of a "<think>" that only the generation prompt has.
            other = self._text((*prompt, Turn("assistant", "\x02answer\x02")))
            boundary = min(boundary, _shared_length(other, opened))
        if boundary < len(opened) and boundary < len(self._text(prompt)):
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
        """What the template writes around an answer: the header before it, a think block or "", and the closing after it."""
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
                prompt_tokens = [int((offsets[:, 1] > begin).argmax()) for _, offsets, _, begin in sides]
                cut = min(longest - self.max_length, *prompt_tokens)
        window = slice(cut, cut + self.max_length)
        ids, masks = [tokens[window] for tokens in ids], [mask[window] for mask in masks]
        for name, mask in zip(("chosen", "rejected"), masks, strict=True):
            # Nothing predicts the first token, because nothing precedes it.
            mask[:1] = 0
            if not mask.any():
                raise RowRefused(
                    "truncated-away",
                    f"{name} has no answer left within --max-length {self.max_length} (the longer side has {longest} tokens)",
                )
        if np.array_equal(ids[0], ids[1]) and np.array_equal(masks[0], masks[1]):
            raise RowRefused("identical", f"the sides are the same tokens within --max-length {self.max_length}")
        return EncodedPair.join(ids[0], masks[0], ids[1], masks[1], source), longest > self.max_length


def _chunks(rows: Iterable[Pair | RowRefused]) -> Iterator[list[Pair | RowRefused]]:
    chunk: list[Pair | RowRefused] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += 0 if isinstance(row, RowRefused) else row.characters
        if len(chunk) == CHUNK or characters > MOST_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _try(pair: Pair, step: Callable[..., R], *arguments: Any) -> R | RowRefused:
    """The step's result, or its refusal as a value, so that one bad row does not end a chunk."""
    try:
        return step(*arguments)
    except RowRefused as refusal:
        refusal.line = pair.line
        return refusal


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


def _end_of(content: str, text: str, begin: int, think: str, closing: str) -> int:
    """Position in `text` of the closing that ends the answer starting at `begin`; -1 unless the answer is exactly `content`."""
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
