"""What `inspect-cache` finds, as plain data: the screen, a picture and other programs read it."""

from dataclasses import dataclass
from typing import Any

from minicache.text import ranges


@dataclass(frozen=True)
class Histogram:
    """edges: BINS + 1 bounds, shared by both sides; chosen, rejected: how many pairs fall between them."""

    edges: list[float]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class MarginHistogram:
    """edges: bounds, multiples of one width; pairs: how many fall between them."""

    edges: list[float]
    pairs: list[int]


@dataclass(frozen=True)
class PairLine:
    """One pair of a list.

    index: what `--pair` calls it; None if a block before it has lost its ledger row, so that nobody can count to it.
    source, line: the file it came from and the line there, from 1. lengths: tokens of prefix, chosen's rest, rejected's rest.
    logp_mean: nats per token of chosen and rejected; margin: their difference. Both None if not scored.
    """

    index: int | None
    source: str
    line: int
    lengths: list[int]
    logp_mean: list[float] | None
    margin: float | None


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect-cache` shows; `--json` prints just this, by these names.

    identity: what the values depend on. log: model, dates, versions, sources (rows = kept + duplicates + refused).
    complete: training may use it, unless a byte of the tokens has changed, which are not read (`--verify` tells).
    problem: why not, where that is no matter of a single block; otherwise None.
    blocks: all there are or should be; blocks_with_pairs, blocks_scored: those that are there, as far as read.
    unfinished: block -> what it lacks, as text. shards: jobs of the last `precompute-ref --shard K/N`, None if there was none;
    shards_missing: which of them, from 1, have blocks that are unfinished. pairs, pairs_scored and all below: of the blocks there.
    tokens: stored, a shared prefix once. counted: tokens in the mean of [chosen, rejected].
    lengths: prefix, chosen, rejected, chosen_counted, rejected_counted -> min, median, mean, p95, max; {} without pairs.
    length_histogram: tokens of whole sides. logp_histogram: mean logprobs, nats per token. None if there is nothing to count.
    margin_histogram: of (chosen - rejected) mean logprob, nats per token; None likewise.
    reference_prefers_chosen: share of scored pairs in which the reference gives chosen the higher logprob, by mean and by sum.
    reference_margin: mean of (chosen - rejected) mean logprob, nats per token.
    refused: rows by reason; refused_rows: all of them; refused_file: where they are listed, None if there is no list.
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
        """The numbers of the blocks and shards that are missing, in words."""
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
    """Consecutive tokens of one kind, as text. shared: they lie in the prefix of both sides."""

    text: str
    counted: bool
    shared: bool


@dataclass(frozen=True)
class PairView:
    """One pair, decoded. segments: of chosen and of rejected; each is the whole side."""

    line: PairLine
    token_count: list[int]
    segments: list[list[Segment]]
