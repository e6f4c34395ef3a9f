"""Options of `export` and `import-cache`: policies and caches as other programs' files, and back."""

from dataclasses import dataclass
from pathlib import Path

from minicache.errors import ConfigError
from minicache.options import texts
from minicache.options.base import AS_STORED, BaseOptions, flag_of
from minicache.options.choices import (
    DTYPES,
    LOGPS,
    LOSS_ON,
    NO_DIRECTORIES,
    ON_BAD_ROW,
    SPECIAL_TEXT,
    THINK,
    TRUNCATE,
    formats,
)
from minicache.options.declare import check_options, flag, needed, option
from minicache.options.where import Where, require_writable

FILES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
OTHER_FILES = (*NO_DIRECTORIES, ".pth", ".json", ".csv", ".tsv", ".txt", ".arrow", ".zst", ".feather")
# Pairs in a block of an imported cache: a kill loses no scores, only writing.
BLOCK_PAIRS = 4096


@dataclass(frozen=True)
class ExportConfig:
    """Options of `export --policy`: writes a Hugging Face directory, or a MiniMind file if `out` ends in .pth."""

    policy: str = needed("A run directory, one of its checkpoints, a model directory, hub id or file.")
    out: Path = needed(
        "For a policy: a directory to create, or a .pth file (MiniMind models only). For a cache: a .parquet, .jsonl, "
        ".jsonl.gz or .jsonl.zst file, or a directory for datasets.load_from_disk."
    )
    dtype: str = option(
        "auto",
        "For a policy: auto (as it is stored; a .pth in float16), float32, float16 or bfloat16.",
        choices=lambda: DTYPES,
    )
    tokenizer: str | None = option(None, "The policy's tokenizer, if it is not with the model.")
    trust_remote_code: bool = option(False, texts.TRUST)

    def __post_init__(self) -> None:
        check_options(self)
        if self.out.suffix != ".pth" and self.out.suffix.lower() in (".pth", *NO_DIRECTORIES):
            raise ConfigError(
                f"--out {self.out}: expected a name that ends in .pth, or the name of a directory to make"
            )
        if self.out.suffix == ".pth" and self.tokenizer:
            raise ConfigError("--tokenizer: a .pth file holds none; leave it out, or name a directory as --out")
        if self.out.suffix == ".pth" and self.dtype == "bfloat16":
            raise ConfigError("--dtype bfloat16: MiniMind's files are in float16 or float32; choose one of these")


@dataclass(frozen=True)
class ExportCacheConfig:
    """Options of `export --ref-cache`. out: a file with a suffix in FILES, or a directory for `datasets.load_from_disk`."""

    ref_cache: Where = needed("Export a reference cache instead, as a table.", metavar="PATH")
    out: Path = needed("A file or a directory, as for a policy.")

    def __post_init__(self) -> None:
        if not self.out.name.endswith(FILES) and self.out.suffix.lower() in (*FILES, *OTHER_FILES):
            raise ConfigError(
                f"--out {self.out}: expected a name that ends in {', '.join(FILES)}, or the name of a directory to make"
            )


@dataclass(frozen=True)
class ImportConfig:
    """Options of `import-cache`: `file` is a table that `export` wrote, or another program's pairs with reference logprobs.

    The options from logps on are for another program's file only.
    """

    file: str = needed("A table from export, or another program's parquet, jsonl or JSON file.", argument=True)
    ref_cache: Where = needed("The reference cache to create.", metavar="PATH")
    model: str | None = option(
        None, "The model whose logprobs the file holds. Not needed for a table from export if --identity is given."
    )
    identity: str | None = option(
        None, "For a table from export: the digest its identity must have, as export printed it."
    )
    logps: str | None = option(
        None,
        "Another program's logprobs: the 'sum' over an answer, or the 'mean' per token.",
        choices=lambda: LOGPS,
    )
    dtype: str | None = option(None, "The precision in which they were computed: {names}.", choices=lambda: DTYPES[1:])
    tokenizer: str | None = option(None, texts.AS_STAGE_ONE)
    chat_template: Path | None = option(None, texts.AS_STAGE_ONE)
    format: str | None = option(None, texts.AS_STAGE_ONE, choices=formats)
    columns: str | None = option(None, texts.AS_STAGE_ONE, metavar="NAME=COLUMN,…")
    ignore_fields: str | None = option(None, texts.AS_STAGE_ONE, metavar="NAME,…")
    template_arg: tuple[str, ...] = option((), texts.AS_STAGE_ONE, metavar="NAME=VALUE")
    date: str | None = option(None, texts.AS_STAGE_ONE, metavar="DATE")
    max_length: int | None = option(None, texts.AS_STAGE_ONE, least=2)
    truncate: str | None = option(None, texts.AS_STAGE_ONE, choices=lambda: TRUNCATE)
    loss_on: str | None = option(None, texts.AS_STAGE_ONE, choices=lambda: LOSS_ON)
    think: str | None = option(None, texts.AS_STAGE_ONE, choices=lambda: THINK)
    special_text: str | None = option(None, texts.AS_STAGE_ONE, choices=lambda: SPECIAL_TEXT)
    block_pairs: int | None = option(None, texts.AS_STAGE_ONE, least=1)
    on_bad_row: str | None = option(None, texts.AS_STAGE_ONE, choices=lambda: ON_BAD_ROW)
    base: BaseOptions = AS_STORED
    trust_remote_code: bool = option(False, texts.TRUST)

    def __post_init__(self) -> None:
        check_options(self)
        require_writable(self.ref_cache)

    @property
    def of_encoding(self) -> dict[str, str | int | Path]:
        """The values, by name, of the options that say how rows become pairs, as far as they are given."""
        names = ("tokenizer", "chat_template", "format", "max_length", "truncate", "loss_on", "think", "special_text")
        rows = ("columns", "ignore_fields", "template_arg", "date")
        given = {name: getattr(self, name) for name in (*names, *rows, "block_pairs", "on_bad_row")}
        return {name: value for name, value in given.items() if value not in (None, ())}

    def require_known(self) -> None:
        """Check the options for a table from `export`.

        Raises:
            ConfigError: an option for another program's file is given.
        """
        wrong = [flag(name) for name in ("logps", "dtype", *self.of_encoding) if getattr(self, name) is not None]
        wrong += [flag_of(self.base.quantization)] if self.base.quantization else []
        if wrong:
            names = ", ".join(wrong)
            raise ConfigError(f"{names}: {self.file} was exported from a cache and holds this itself; leave it out")

    def require_stated(self) -> None:
        """Check the options for another program's file.

        Raises:
            ConfigError: --identity is given, or one of --model, --logps and --dtype is not.
        """
        if self.identity:
            raise ConfigError(f"--identity: {self.file} was not exported from a cache and has none; add --model")
        needed = {"--model": self.model, "--logps": self.logps, "--dtype": self.dtype}
        if missing := ", ".join(name for name, value in needed.items() if value is None):
            raise ConfigError(
                f"{self.file}: another program's file; expected {missing} too: the model whose logprobs it holds, 'sum' or "
                f"'mean', and the precision they were computed in ({', '.join(DTYPES[1:])})"
            )
