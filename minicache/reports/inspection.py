"""The findings of `inspect-cache` as plain data, which the screen, pages and other programs read."""

from dataclasses import dataclass
from typing import Any

from minicache.text import ranges


@dataclass(frozen=True)
class Histogram:
    """A histogram of both sides. edges: BINS + 1 bounds, shared by the sides; chosen, rejected: number of pairs in each bin."""

    edges: list[float]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class MarginHistogram:
    """A histogram of margins. edges: bounds, multiples of one width; pairs: number of pairs in each bin."""

    edges: list[float]
    pairs: list[int]


@dataclass(frozen=True)
class PairLine:
    """One pair of a list.

    index: position in the cache, as for `--pair`; None if an earlier block has lost its ledger row, so that it is not known.
    source, line: file and line (from 1) of the pair. lengths: tokens of prefix, chosen's rest, rejected's rest.
    logp_mean: mean logprobs of chosen and rejected, nats per token; margin: their difference. None if not scored.
    """

    index: int | None
    source: str
    line: int
    lengths: list[int]
    logp_mean: list[float] | None
    margin: float | None


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect-cache` shows; the names are those of `--json`.

    identity: the fields on which values depend. log: model, dates, versions, sources (rows = kept + duplicates + refused).
    complete: whether training can use the cache. Tokens are not read; only `--verify` finds damage in them.
    problem: why the cache as a whole is not complete, or None; problems of single blocks are in `unfinished`.
    blocks: number of blocks that exist or should; blocks_with_pairs, blocks_scored: number of those that are readable so far.
    unfinished: block -> what it lacks, as text. shards: jobs of the last `precompute-ref --shard K/N`, None without one;
    shards_missing: numbers, from 1, of those with unfinished blocks. pairs, pairs_scored and all below: of the readable blocks.
    tokens: stored tokens; a shared prefix counts once. counted: tokens in the means of [chosen, rejected].
    lengths: prefix, chosen, rejected, chosen_counted, rejected_counted -> min, median, mean, p95, max; {} without pairs.
    length_histogram: tokens of whole sides. logp_histogram: mean logprobs, nats per token. None without values.
    margin_histogram: (chosen - rejected) mean logprobs, nats per token; None without values.
    reference_prefers_chosen: share of scored pairs in which the reference gives chosen the higher logprob, by mean and by sum.
    reference_margin: mean of (chosen - rejected) mean logprobs, nats per token.
    refused: number of rows by reason; refused_rows: of all reasons; refused_file: their list, None without one.
    longest: by the longer side. highest_margin, lowest_margin: by mean logprob. lowest_logp: by the less likely side.
    """

    path: str
    identity: dict[str, Any]
    identity_digest: str
    log: dict[str, Any]
    complete: bool
    problem: str | None
    blocks: int
    blocks_with_pairs: int
    blocks_scored: int
    unfinished: dict[str, str]
    shards: int | None
    shards_missing: list[int]
    pairs: int
    pairs_scored: int
    tokens: int
    counted: list[int]
    bytes_on_disk: int
    lengths: dict[str, dict[str, float]]
    length_histogram: Histogram | None
    logp_histogram: Histogram | None
    margin_histogram: MarginHistogram | None
    reference_prefers_chosen: dict[str, float] | None
    reference_margin: float | None
    refused: dict[str, int]
    refused_rows: int
    refused_file: str | None
    truncated: int
    longest: list[PairLine]
    highest_margin: list[PairLine]
    lowest_margin: list[PairLine]
    lowest_logp: list[PairLine]

    @property
    def missing(self) -> list[str]:
        """The numbers of unfinished blocks and missing shards, in words."""
        lines = [f"unfinished: block {ranges(map(int, self.unfinished))}"] if self.unfinished else []
        if self.shards_missing:
            which = f"{ranges(self.shards_missing)} of {self.shards}"
            lines.append(f"shards missing: {which} (precompute-ref --shard K/{self.shards})")
        return lines

    @property
    def problems(self) -> list[str]:
        """Why the cache is not complete: as a whole, then block by block."""
        return [
            *([self.problem] if self.problem else []),
            *(f"block {block}: {why}" for block, why in self.unfinished.items()),
        ]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one kind, as text. shared: whether they are in the prefix of both sides.

    special: begin and end of each special token in the text; the same text typed in a row, encoded as plain text, is none.
    """

    text: str
    counted: bool
    shared: bool
    special: list[list[int]]


@dataclass(frozen=True)
class PairView:
    """A decoded pair. segments: those of the whole chosen side, and of the whole rejected side."""

    line: PairLine
    token_count: list[int]
    segments: list[list[Segment]]
