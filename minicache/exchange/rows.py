"""Cached pairs as rows of a table, and back: what `export --ref-cache` writes and `import-cache` reads. No torch.

Some columns are for other programs (text, sums); from the rest a pair and its scores are rebuilt exactly.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache.cache.identity import Identity
from minicache.cache.manifest import Source
from minicache.cache.schema import CachedPairs, RefBlock
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import DataError
from minicache.exchange.tables import Columns, Ragged
from minicache.pairs import CHOSEN, REJECTED, EncodedPair, PairTable, count_tokens

TYPES = {
    "prompt": "string",
    "chosen": "string",
    "rejected": "string",
    "ref_chosen_logps": "double",
    "ref_rejected_logps": "double",
    "chosen_token_count": "int32",
    "rejected_token_count": "int32",
    "digest": "string",
    "file": "string",
    "line": "int64",
    "source": "int32",
    "prompt_ids": "list<int32>",
    "chosen_ids": "list<int32>",
    "rejected_ids": "list<int32>",
    "chosen_loss_mask": "list<uint8>",
    "rejected_loss_mask": "list<uint8>",
}
PER_TOKEN = {"ref_token_logps": "list<float>"}


def prompt_length(pair: EncodedPair) -> int:
    """The number of tokens before the answers. The shared prefix extends into the answers if they begin with the same tokens.

    The answers begin with the run of counted tokens in which the sides diverge, or after the prefix if they diverge outside one.
    """
    prefix, chosen, _ = pair.lengths
    if not (pair.loss_mask[prefix] or pair.loss_mask[prefix + chosen]):
        return prefix
    uncounted = np.flatnonzero(pair.loss_mask[:prefix] == 0)
    return int(uncounted[-1]) + 1 if len(uncounted) else 0


def is_plain(pair: EncodedPair, prompt: int) -> bool:
    """Whether all tokens of the answers count and none of the prompt, as programs without a mask assume."""
    return not pair.loss_mask[:prompt].any() and bool(pair.loss_mask[max(prompt, 1) :].all())


def to_columns(cached: CachedPairs, tokenizer: ChatTokenizer, sources: list[Source]) -> tuple[Columns, int]:
    """A block as columns in the order of TYPES, and how many of its pairs are not plain (see `is_plain`)."""
    table, reference = cached
    pairs = [table[index] for index in range(len(table))]
    prompts = [prompt_length(pair) for pair in pairs]
    columns = {
        **_text_columns(pairs, prompts, tokenizer),
        **_score_columns(reference),
        **_origin_columns(pairs, table, sources),
        **_token_columns(pairs, prompts),
    }
    if reference.token_logps is not None:
        columns["ref_token_logps"] = _counted_logps(table, reference.token_logps)
    ordered = {name: columns[name] for name in (*TYPES, *PER_TOKEN) if name in columns}
    return ordered, sum(not is_plain(pair, prompt) for pair, prompt in zip(pairs, prompts, strict=True))


def _text_columns(pairs: list[EncodedPair], prompts: list[int], tokenizer: ChatTokenizer) -> Columns:
    texts = [_texts(pair, prompt, tokenizer) for pair, prompt in zip(pairs, prompts, strict=True)]
    return {name: [each[at] for each in texts] for at, name in enumerate(("prompt", "chosen", "rejected"))}


def _score_columns(reference: RefBlock) -> Columns:
    """Sums of logprobs and counts of tokens. The sums are float64, from which the means are restored exactly.

    A mean has 24 bits and a count is below 2**29, so their product fits the 53 bits of float64.
    """
    sums = reference.logp_mean.astype(np.float64) * reference.token_count
    return {
        "ref_chosen_logps": sums[:, CHOSEN],
        "ref_rejected_logps": sums[:, REJECTED],
        "chosen_token_count": reference.token_count[:, CHOSEN],
        "rejected_token_count": reference.token_count[:, REJECTED],
    }


def _origin_columns(pairs: list[EncodedPair], table: PairTable, sources: list[Source]) -> Columns:
    """Digest, file and line of each pair."""
    numbers, lines = table.source.T
    return {
        "digest": [pair.digest.hex() for pair in pairs],
        "file": [_storable(sources[number].name) for number in numbers.tolist()],
        "line": lines,
        "source": numbers.astype(np.int32),
    }


def _token_columns(pairs: list[EncodedPair], prompts: list[int]) -> Columns:
    """Ids of the prompt and of both answers, and the masks of both sides, prompt included."""
    chosen, rejected = ([pair.side(side) for pair in pairs] for side in (CHOSEN, REJECTED))
    return {
        "prompt_ids": Ragged.of([ids[:n] for (ids, _), n in zip(chosen, prompts, strict=True)]),
        "chosen_ids": Ragged.of([ids[n:] for (ids, _), n in zip(chosen, prompts, strict=True)]),
        "rejected_ids": Ragged.of([ids[n:] for (ids, _), n in zip(rejected, prompts, strict=True)]),
        "chosen_loss_mask": Ragged.of([mask for _, mask in chosen]),
        "rejected_loss_mask": Ragged.of([mask for _, mask in rejected]),
    }


def _texts(pair: EncodedPair, prompt: int, tokenizer: ChatTokenizer) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as text.

    An answer is cut from the decoded side: some tokenizers decode the beginning of a text differently from its middle.
    """
    sides = [pair.side(side)[0] for side in (CHOSEN, REJECTED)]
    shared = tokenizer.decode(sides[CHOSEN][:prompt])
    answers = []
    for ids in sides:
        whole = tokenizer.decode(ids)
        answers.append(whole[len(shared) :] if whole.startswith(shared) else tokenizer.decode(ids[prompt:]))
    return shared, answers[CHOSEN], answers[REJECTED]


def _counted_logps(table: PairTable, token_logps: NDArray[np.float32]) -> Ragged:
    """The logprobs of the counted tokens, in stored order."""
    counted = table.loss_mask == 1
    assert np.array_equal(counted, np.isfinite(token_logps)), (
        "a logprob stands where no token counts, or lacks where one does"
    )
    ends = np.concatenate([[0], counted.cumsum()])[table.offsets]
    return Ragged(token_logps[counted], ends)


def _storable(name: str) -> str:
    """A file's name with its non-UTF-8 bytes escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class ExportedRow:
    """A rebuilt pair.

    logp_mean: (2,) float32, nats per token. token_logps: (n,) float32, NaN for tokens that do not count; None in a cache without
    them.
    """

    pair: EncodedPair
    logp_mean: NDArray[np.float32]
    token_logps: NDArray[np.float32] | None


def from_row(row: Any, identity: Identity, where: str) -> ExportedRow:
    """The pair of a row, checked against its digest and counts. where: file and row, for messages.

    Raises:
        DataError: the row is not as it was exported.
    """
    try:
        pair = _pair(row)
        digest, counts = row["digest"], [row["chosen_token_count"], row["rejected_token_count"]]
        sums = np.array([row["ref_chosen_logps"], row["ref_rejected_logps"]], np.float64)
        logps = np.array(row["ref_token_logps"], np.float32) if identity.per_token else None
    except (KeyError, TypeError, ValueError, OverflowError, IndexError) as error:
        kind = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(f"{where}: is not as it was exported: {kind}; export the cache again") from None
    _require_same_tokens(pair, digest, identity, where)
    found = count_tokens(np.array([pair.lengths], np.int32), pair.loss_mask)[0]
    if found.tolist() != counts or not np.isfinite(sums).all() or 0 in counts:
        raise DataError(
            f"{where}: expected counts {found.tolist()} above 0, by the masks, and finite sums; got {counts} and {sums.tolist()}"
        )
    if logps is not None:
        logps = _at_counted_tokens(logps, pair, where)
    return ExportedRow(pair, (sums / found).astype(np.float32), logps)


def _require_same_tokens(pair: EncodedPair, digest: object, identity: Identity, where: str) -> None:
    """Raises DataError: tokens or masks do not fit the digest, or cannot be in a cache of this identity."""
    if pair.digest.hex() != digest:
        raise DataError(
            f"{where}: its tokens or masks have the digest {pair.digest.hex()}, the row has {str(digest)[:40]!r}: something was "
            "changed after the export; export the cache again"
        )
    longest = pair.lengths[0] + max(pair.lengths[1:])
    if pair.tokens.min() < 0 or pair.tokens.max() >= identity.vocabulary or longest > identity.max_length:
        raise DataError(
            f"{where}: expected ids below {identity.vocabulary} and at most {identity.max_length} tokens a side"
        )


def _at_counted_tokens(logps: NDArray[np.float32], pair: EncodedPair, where: str) -> NDArray[np.float32]:
    """(n,) the logprobs of the counted tokens at the places of their tokens, NaN elsewhere. Raises DataError."""
    if logps.shape != (int(pair.loss_mask.sum()),):
        raise DataError(f"{where}: expected {pair.loss_mask.sum()} numbers in ref_token_logps, got {logps.size}")
    spread = np.full(len(pair.tokens), np.nan, np.float32)
    spread[pair.loss_mask == 1] = logps
    return spread


def _pair(row: Any) -> EncodedPair:
    """The pair of a row. Raises ValueError, TypeError, KeyError and others: the row has other columns or values."""
    prompt = row["prompt_ids"]
    sides: list[NDArray[Any]] = []
    for side in ("chosen", "rejected"):
        ids = np.array([*prompt, *row[f"{side}_ids"]], np.int32)
        mask = np.array(row[f"{side}_loss_mask"], np.uint8)
        if not row[f"{side}_ids"] or mask.shape != ids.shape or mask.max() > 1:
            raise ValueError(f"{side}: expected an answer, and a 0 or 1 for each of {len(ids)} tokens")
        sides += [ids, mask]
    return EncodedPair.join(sides[0], sides[1], sides[2], sides[3], (int(row["source"]), int(row["line"])))


def to_block(rows: list[ExportedRow], identity: Identity) -> CachedPairs:
    """The pairs and scores of these rows as a block of a cache."""
    table = PairTable.from_pairs([row.pair for row in rows], identity.token_dtype)
    logps = [row.token_logps for row in rows if row.token_logps is not None]
    means = np.stack([row.logp_mean for row in rows])
    return CachedPairs(table, RefBlock(means, table.token_counts, np.concatenate(logps) if logps else None))
