"""Pair -> EncodedPair: tokenizing, truncation, loss mask.

Each side is tokenized *whole*, and what counts is found from the character spans of the tokens: whenever a token crosses the
boundary of prompt and answer, tokenizing them apart would give other ids than the model sees. A token that reaches past the
boundary belongs to the answer.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np

from minicache.data.differences import Span
from minicache.data.records import Note, Pair
from minicache.data.spans import Renderer, Side
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import RowRefused
from minicache.pairs import EncodedPair, Ints

# Pairs tokenized in one call: enough for the tokenizers library to keep all cores busy.
CHUNK = 128
# Characters tokenized in one call, roughly: the call takes about fifty bytes of memory for each.
MOST_CHARACTERS = 2**24

R = TypeVar("R")


class Encoded(NamedTuple):
    """An encoded pair. truncated: whether it was cut. notes: on parts of the row that no token stands for."""

    pair: EncodedPair
    truncated: bool
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """Turns pairs into token ids.

    max_length: most tokens of a side.
    truncate: 'right' cuts the end of a longer side; 'left' cuts the beginning of the prompt, equally on both sides, and then the
        end; 'refuse' refuses the row.
    loss_on: which tokens count: 'response' (all after the shared prompt turns), 'answer' (the assistant's turns among these),
        or 'assistant' (every assistant turn); each turn with its closing token.
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

    def encode_all(self, rows: Iterable[Pair | RowRefused], file: int) -> Iterator[Encoded | RowRefused]:
        """For each row, in order: the encoded pair, or the refusal."""
        for chunk in _chunks(rows):
            rendered = [row if isinstance(row, RowRefused) else _try(row, self._renderer.render, row) for row in chunk]
            all_sides = [side for item in rendered if not isinstance(item, RowRefused) for side in item[0]]
            hiding = [at for at, side in enumerate(all_sides) if side.hides]
            encoded = iter(self._tokens([side.text for side in all_sides], hiding))
            for row, item in zip(chunk, rendered, strict=True):
                if isinstance(item, RowRefused):
                    yield item
                    continue
                assert isinstance(row, Pair)
                result = _try(row, self._assemble, item[0], [next(encoded) for _ in item[0]], (file, row.line))
                yield result if isinstance(result, RowRefused) else Encoded(*result, tuple(dict.fromkeys(item[1])))

    def encode(self, pair: Pair, file: int = 0) -> Encoded:
        """The encoded pair.

        Raises:
            RowRefused: the pair has nothing to learn from, or does not fit.
        """
        (result,) = self.encode_all([pair], file)
        if isinstance(result, RowRefused):
            raise result
        return result

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.loss_on, self.think, self.special_text)

    def _tokens(self, texts: list[str], hiding: list[int]) -> list[tuple[Ints, Ints] | RowRefused]:
        """As `ChatTokenizer.encode`, with a refusal for each text that cannot be encoded."""
        try:
            return [*self.tokenizer.encode(texts, hiding)]
        except RowRefused as refusal:
            if len(texts) == 1:
                return [refusal]
        return [each for at, text in enumerate(texts) for each in self._tokens([text], [0] if at in hiding else [])]

    def _assemble(
        self, sides: Sequence[Side], encoded: Sequence[tuple[Ints, Ints] | RowRefused], source: tuple[int, int]
    ) -> tuple[EncodedPair, bool]:
        tokens: list[tuple[Ints, Ints]] = []
        for each in encoded:
            if isinstance(each, RowRefused):
                raise each
            tokens.append(each)
        ids = [numbers for numbers, _ in tokens]
        masks = [_mask(offsets, side.spans) for (_, offsets), side in zip(tokens, sides, strict=True)]
        for name, mask in zip(("chosen", "rejected"), masks, strict=True):
            if not mask.any():
                raise RowRefused("empty-answer", f"{name} has no token that counts")
        longest = max(len(tokens) for tokens in ids)
        cut = 0
        if longest > self.max_length:
            if self.truncate == "refuse":
                raise RowRefused("too-long", f"{longest} tokens; --max-length is {self.max_length}")
            if self.truncate == "left":
                prompt_tokens = [
                    int((offsets[:, 1] > side.begin).argmax()) for (_, offsets), side in zip(tokens, sides, strict=True)
                ]
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


def _mask(offsets: Ints, spans: list[Span]) -> np.ndarray:
    """(n,) uint8: 1 for each token that spans a character of a counted span."""
    mask = np.zeros(len(offsets), np.uint8)
    for begin, end in spans:
        mask |= ((offsets[:, 1] > begin) & (offsets[:, 0] < end)).astype(np.uint8)
    return mask
