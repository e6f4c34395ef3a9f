"""Options of the commands that bring caches and policies into other programs' files and back."""

from dataclasses import dataclass
from pathlib import Path

from minicache.errors import ConfigError
from minicache.options.checks import at_least, one_of
from minicache.options.choices import (
    DTYPES,
    FORMATS,
    LOGPS,
    LOSS_ON,
    NO_DIRECTORIES,
    ON_BAD_ROW,
    SPECIAL_TEXT,
    THINK,
    TRUNCATE,
)
from minicache.options.where import Where


@dataclass(frozen=True)
class ExportConfig:
    """A policy in another form: a Hugging Face directory, or MiniMind's if `out` ends in .pth.

    dtype: auto is the precision it is stored in; of a .pth float16, as MiniMind's own scripts write it.
    """

    policy: str
    out: Path
    dtype: str = "auto"
    tokenizer: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        one_of("--dtype", self.dtype, DTYPES)
        if self.out.suffix != ".pth" and self.out.suffix.lower() in (".pth", *NO_DIRECTORIES):
            raise ConfigError(
                f"--out {self.out}: expected a name that ends in .pth, or the name of a directory to make"
            )
        if self.out.suffix == ".pth" and self.tokenizer:
            raise ConfigError("--tokenizer: a .pth file holds none; expected it with a directory as --out only")
        if self.out.suffix == ".pth" and self.dtype == "bfloat16":
            raise ConfigError("--dtype bfloat16: MiniMind's files are in float16 or float32; choose one of these")


FILES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")


OTHER_FILES = (*NO_DIRECTORIES, ".pth", ".json", ".csv", ".tsv", ".txt", ".arrow", ".zst", ".feather")


BLOCK_PAIRS = 4096  # of a cache whose pairs are not scored here: nothing is lost by a kill but writing


@dataclass(frozen=True)
class ExportCacheConfig:
    """A cache as a table: `out` is a file of a kind in FILES, or a directory for `datasets.load_from_disk`."""

    ref_cache: Where
    out: Path

    def __post_init__(self) -> None:
        if not self.out.name.endswith(FILES) and self.out.suffix.lower() in (*FILES, *OTHER_FILES):
            raise ConfigError(
                f"--out {self.out}: expected a name that ends in {', '.join(FILES)}, or the name of a directory to make"
            )


@dataclass(frozen=True)
class ImportConfig:
    """A table as a cache.

    file: as `export` wrote it, or another program's with rows as of a preference file and the reference's logprobs.
    model: whose logprobs they are. identity: of an exported file, the digest that its identity is expected to have.
    logps: what another program's columns hold, the 'sum' over an answer or the 'mean' a token; its other options are
        `PrecomputeConfig`'s. dtype: the precision in which they were computed. None of them goes with an exported file.
    """

    file: str
    ref_cache: Where
    model: str | None = None
    identity: str | None = None
    logps: str | None = None
    dtype: str | None = None
    tokenizer: str | None = None
    chat_template: Path | None = None
    format: str | None = None
    max_length: int | None = None
    truncate: str | None = None
    loss_on: str | None = None
    think: str | None = None
    special_text: str | None = None
    block_pairs: int | None = None
    on_bad_row: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        one_of("--logps", self.logps, (*LOGPS, None))
        one_of("--dtype", self.dtype, (*DTYPES[1:], None))
        one_of("--format", self.format, (*FORMATS, None))
        one_of("--truncate", self.truncate, (*TRUNCATE, None))
        one_of("--loss-on", self.loss_on, (*LOSS_ON, None))
        one_of("--think", self.think, (*THINK, None))
        one_of("--special-text", self.special_text, (*SPECIAL_TEXT, None))
        one_of("--on-bad-row", self.on_bad_row, (*ON_BAD_ROW, None))
        at_least("--max-length", self.max_length, 2)
        at_least("--block-pairs", self.block_pairs, 1)

    @property
    def of_encoding(self) -> dict[str, str | int | Path]:
        """The options given that say how rows become pairs, by name."""
        names = ("tokenizer", "chat_template", "format", "max_length", "truncate", "loss_on", "think", "special_text")
        given = {name: getattr(self, name) for name in (*names, "block_pairs", "on_bad_row")}
        return {name: value for name, value in given.items() if value is not None}

    def require_known(self) -> None:
        """Of an exported file. Raises ConfigError unless the user says what it is, and says nothing else."""
        if wrong := [name for name in ("logps", "dtype", *self.of_encoding) if getattr(self, name) is not None]:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
            raise ConfigError(f"{names}: {self.file} was exported from a cache and says this itself; leave it out")

    def require_stated(self) -> None:
        """Of another program's file. Raises ConfigError unless the user says whose logprobs it holds."""
        if self.identity:
            raise ConfigError(f"--identity: {self.file} was not exported from a cache and has none; say --model")
        said = {"--model": self.model, "--logps": self.logps, "--dtype": self.dtype}
        if missing := ", ".join(name for name, value in said.items() if value is None):
            raise ConfigError(
                f"{self.file}: another program's file; expected {missing} too: the model whose logprobs it holds, 'sum' or "
                f"'mean', and the precision they were computed in ({', '.join(DTYPES[1:])})"
            )
