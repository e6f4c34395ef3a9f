"""Options of `precompute-ref`."""

from dataclasses import dataclass
from pathlib import Path

from minicache.data.arguments import parse_arguments, require_date
from minicache.data.columns import Reading
from minicache.errors import ConfigError
from minicache.options import texts
from minicache.options.base import AS_STORED, BaseOptions
from minicache.options.checks import split_share
from minicache.options.choices import (
    DTYPES,
    LOSS_ON,
    MOST_BLOCK_PAIRS,
    MOST_LENGTH,
    ON_BAD_ROW,
    PAIRS,
    PARALLEL,
    SPECIAL_TEXT,
    THINK,
    TRUNCATE,
    formats,
    layout_help,
    layouts,
)
from minicache.options.declare import check_options, needed, option
from minicache.options.where import Where, require_writable


@dataclass(frozen=True)
class PrecomputeConfig:
    """Options of stage one. model, tokenizer: a directory, a hub id or a file. data: what `minicache.data.places` locates.

    Sizes are in tokens or pairs.

    Raises:
        ConfigError: a value cannot work. Construction raises it, before any file is opened or model loaded.
    """

    model: str = needed("The SFT model: directory, hub id, .gguf or MiniMind .pth.")
    data: tuple[str, ...] = needed(
        "Preference data: files, folders, globs in quotes, URLs, - (standard input), Hub data sets org/name[:config][@split]."
    )
    ref_cache: Where = needed(texts.REF_CACHE, metavar="PATH")
    tokenizer: str | None = option(None, "The tokenizer, if it is not with the model (a .pth has none).")
    chat_template: Path | None = option(None, "A Jinja template that replaces the tokenizer's own.")
    template_arg: tuple[str, ...] = option((), texts.TEMPLATE_ARG, metavar="NAME=VALUE")
    date: str = option("", texts.DATE, metavar="DATE")
    format: str = option("auto", "Row format: {names}.", choices=formats)
    columns: str = option("", texts.COLUMNS, metavar="NAME=COLUMN,…")
    ignore_fields: str = option("", texts.IGNORE_FIELDS, metavar="NAME,…")
    row_pairs: str | None = option(None, texts.PAIRS, shown="--pairs", choices=lambda: PAIRS)
    limit: int | None = option(None, "Read only so many rows, the first ones of all files.", least=1)
    sample: int | None = option(
        None, "Read only so many rows, chosen by their content: the same ones in any order of rows and files.", least=1
    )
    sample_seed: int = option(0, "Another seed gives another --sample.", least=0, most=2**63 - 1)
    max_length: int = option(1024, "Most tokens of prompt and answer together.", least=2, most=MOST_LENGTH)
    truncate: str = option(
        "right",
        "How a longer side is cut: 'right' at its end, 'left' at the prompt's beginning; or 'refuse' the row.",
        choices=lambda: TRUNCATE,
    )
    loss_on: str = option(
        "response",
        "Tokens that count: the whole 'response', the assistant's 'answer' in it, or every 'assistant' turn.",
        choices=lambda: LOSS_ON,
    )
    think: str = option(
        "keep", "An empty think block that the template writes: 'keep' it or 'drop' it.", choices=lambda: THINK
    )
    special_text: str = option(
        "plain",
        "The text of a special token, such as <|im_end|>, in a content: 'plain' text, 'refuse' the row, or 'allow'.",
        choices=lambda: SPECIAL_TEXT,
    )
    dtype: str = option("auto", texts.DTYPE, aliases=("--ref-dtype",), choices=lambda: DTYPES)
    base: BaseOptions = AS_STORED
    block_pairs: int | None = option(
        None, "Pairs in a block, the unit of resuming. (Default: by model size.)", least=1, most=MOST_BLOCK_PAIRS
    )
    layout: str = option("auto", layout_help(), choices=layouts)
    parallel: str = option("ddp", texts.PARALLEL, choices=lambda: PARALLEL)
    tokens_per_batch: int | None = option(None, texts.TOKENS_PER_BATCH, least=1)
    compile: bool = option(False, texts.COMPILE)
    per_token: bool = option(False, "Also store each counted token's logprob.")
    on_bad_row: str = option(
        "skip", "A row that cannot be used: 'skip' and list it, or 'fail'.", choices=lambda: ON_BAD_ROW
    )
    shard: str | None = option(
        None, "Run as job K of N that share one cache; each scores its own blocks.", metavar="K/N"
    )
    trust_remote_code: bool = option(False, texts.TRUST)

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("--data: expected at least one preference file, got none")
        check_options(self)
        require_writable(self.ref_cache)
        split_share(self.shard)
        require_date(self.date)
        parse_arguments(self.template_arg)
        self.reading.require_sound()
        if self.limit and self.sample:
            raise ConfigError("--limit: --sample chooses the rows; expected one of the two, got both")
        if self.sample_seed and not self.sample:
            raise ConfigError("--sample-seed: is the seed of --sample; expected both, got it alone")

    @property
    def reading(self) -> Reading:
        """How rows become pairs."""
        return Reading(
            format=self.format,
            columns=self.columns,
            ignore_fields=self.ignore_fields,
            pairs=self.row_pairs or "",
            limit=self.limit,
            sample=self.sample,
            sample_seed=self.sample_seed,
        )

    @property
    def share(self) -> tuple[int, int]:
        """The number of this job, from 1, and the number of jobs."""
        return split_share(self.shard)
