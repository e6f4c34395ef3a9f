"""Pairs of a cache as text: token by token if the cache has each token's logprob, otherwise in runs."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minicache.cache.reader import ReferenceCache
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheError
from minicache.pairs import CHOSEN, REJECTED, EncodedPair, Ints
from minicache.text import visible

# Tokens shown of a pair: the last ones of the shared prefix, the first ones of each side's rest.
SHARED_SHOWN, OWN_SHOWN = 300, 600

# Text that does not count; [text] that counts; [text, logprob] of one token that counts; a number of tokens left out. Each
# special token is a piece of its own.
Plain = str | list[Any]
Piece = Plain | dict[Literal["special"], Plain] | int


def pair_texts(cache: ReferenceCache, tokenizer: ChatTokenizer, indices: list[int]) -> dict[int, list[list[Piece]]]:
    """The pieces of each pair: of its prefix, of chosen's rest, of rejected's rest. Pairs that cannot be read are left out."""
    blocks, texts = cache.blocks, {}
    wanted = {
        block: (span, chosen) for block, span in blocks.spans() if (chosen := [i for i in sorted(indices) if i in span])
    }
    for block, table in blocks.each(blocks.pairs, wanted):
        if isinstance(table, CacheError):
            continue
        ((_, scores),) = blocks.each(blocks.ref, [block])
        logps = None if isinstance(scores, CacheError) else scores.token_logps
        span, chosen = wanted[block]
        for index in chosen:
            start, stop = table.offsets[index - span.start : index - span.start + 2]
            own = logps[start:stop] if logps is not None else None
            texts[index] = _pieces(table[index - span.start], own, tokenizer)
    return texts


def _pieces(pair: EncodedPair, logps: np.ndarray | None, tokenizer: ChatTokenizer) -> list[list[Piece]]:
    """The pieces of a pair. logps: (n,) logprobs of all its tokens, NaN for those that do not count; None if not known."""
    prefix, chosen, _ = pair.lengths
    values = np.full(len(pair.tokens), np.nan, np.float32) if logps is None else logps
    sides = [np.arange(prefix + chosen), np.r_[0:prefix, prefix + chosen : len(pair.tokens)]]
    skipped = max(0, prefix - SHARED_SHOWN)
    parts: list[list[Piece]] = [[skipped] if skipped else []]
    places = sides[CHOSEN]
    parts[0] += _run(pair, places, (skipped, prefix), values, tokenizer)
    for side in (CHOSEN, REJECTED):
        places = sides[side]
        stop = min(len(places), prefix + OWN_SHOWN)
        part = _run(pair, places, (prefix, stop), values, tokenizer)
        parts.append(part + ([len(places) - stop] if stop < len(places) else []))
    return parts


def _run(
    pair: EncodedPair, places: Ints, span: tuple[int, int], logps: np.ndarray, tokenizer: ChatTokenizer
) -> list[Piece]:
    """The pieces of the tokens from span[0] to span[1] of a side. places: (m,) the side's tokens in the pair."""
    ids, mask, values = pair.tokens[places], pair.loss_mask[places], logps[places]
    special = tokenizer.are_special(ids)
    pieces: list[Piece] = []
    for start, stop, text in _texts(tokenizer, ids, span, special):
        piece: Plain = visible(text) if not mask[start] else [visible(text)]
        if isinstance(piece, list) and np.isfinite(values[start:stop]).all():
            piece.append(round(float(values[start:stop].sum()), 3))
        last = pieces[-1] if pieces else None
        if special[start]:
            pieces.append({"special": piece})
        elif isinstance(piece, str) and isinstance(last, str):
            pieces[-1] = last + piece
        elif isinstance(last, list) and len(piece) == 1 and isinstance(piece, list):
            last[0] += piece[0]
        else:
            pieces.append(piece)
    return pieces


def _texts(
    tokenizer: ChatTokenizer, ids: Ints, span: tuple[int, int], special: NDArray[np.bool_]
) -> Iterator[tuple[int, int, str]]:
    """The shortest runs of tokens that make whole characters: begin, end and text of each. A special token is its own run.

    A run is decoded together with the one before it: a decoder may drop the space before the first word.
    """
    begin = start = span[0]
    for stop in range(span[0] + 1, span[1] + 1):
        text = tokenizer.decode_after(ids[begin:stop], start - begin)
        # The rest of a character is missing.
        if text.endswith("\ufffd") and stop < span[1] and not special[stop] and stop - start < 8:
            continue
        yield start, stop, text
        begin, start = start, stop
