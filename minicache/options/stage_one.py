"""Options of `precompute-ref`."""

from dataclasses import dataclass
from pathlib import Path

from minicache.errors import ConfigError
from minicache.options.checks import at_least, at_most, one_of, split_share
from minicache.options.choices import (
    DTYPES,
    FORMATS,
    LAYOUTS,
    LOSS_ON,
    MOST_BLOCK_PAIRS,
    MOST_LENGTH,
    ON_BAD_ROW,
    PARALLEL,
    SPECIAL_TEXT,
    THINK,
    TRUNCATE,
)
from minicache.options.where import Where


@dataclass(frozen=True)
class PrecomputeConfig:
    """Stage one. `model` and `tokenizer` are a directory, a hub id or a file; sizes are in tokens or pairs.

    think: whether an empty think block that the chat template writes is kept or dropped.
    special_text: what the text of a special token in a content is: plain text, a reason to refuse the row, or that token.
    shard: "K/N": score only every N-th block, from the K-th, as one of N independent jobs.
    """

    model: str
    data: tuple[str, ...]
    ref_cache: Where
    tokenizer: str | None = None
    chat_template: Path | None = None
    format: str = "auto"
    max_length: int = 1024
    truncate: str = "right"
    loss_on: str = "response"
    think: str = "keep"
    special_text: str = "plain"
    dtype: str = "auto"
    block_pairs: int | None = None
    layout: str = "auto"
    parallel: str = "ddp"
    tokens_per_batch: int | None = None
    per_token: bool = False
    on_bad_row: str = "skip"
    shard: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("--data: expected at least one preference file, got none")
        one_of("--format", self.format, FORMATS)
        at_least("--max-length", self.max_length, 2)
        at_most("--max-length", self.max_length, MOST_LENGTH)
        one_of("--truncate", self.truncate, TRUNCATE)
        one_of("--loss-on", self.loss_on, LOSS_ON)
        one_of("--think", self.think, THINK)
        one_of("--special-text", self.special_text, SPECIAL_TEXT)
        one_of("--dtype", self.dtype, DTYPES)
        at_least("--block-pairs", self.block_pairs, 1)
        at_most("--block-pairs", self.block_pairs, MOST_BLOCK_PAIRS)
        at_least("--tokens-per-batch", self.tokens_per_batch, 1)
        one_of("--layout", self.layout, LAYOUTS)
        one_of("--parallel", self.parallel, PARALLEL)
        one_of("--on-bad-row", self.on_bad_row, ON_BAD_ROW)
        split_share(self.shard)

    @property
    def share(self) -> tuple[int, int]:
        return split_share(self.shard)
