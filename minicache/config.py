"""Every option once, with its default and its check. Frozen; no torch.

A stage gets one of these and nothing else to decide by. A value that cannot work is a `ConfigError` at construction, before
any file is opened or model loaded.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from minicache.errors import ConfigError

FORMATS = ("auto", "messages", "prompt", "stack-exchange", "sharegpt", "hh")
TRUNCATE = ("right", "left", "refuse")
LOSS_ON = ("response", "assistant")
DTYPES = ("auto", "bfloat16", "float16", "float32")
ON_BAD_ROW = ("skip", "fail")
THINK = ("keep", "drop")
SPECIAL_TEXT = ("plain", "refuse", "allow")
LOGPS = ("mean", "sum")
LAYOUTS = ("auto", "packed", "shared", "padded")
PARALLEL = ("ddp", "fsdp", "hybrid")
MOST_LENGTH, MOST_BLOCK_PAIRS = 2**24, 2**20  # sizes of a cache's arrays follow from them
NO_DIRECTORIES = (".pt", ".bin", ".ckpt", ".safetensors", ".gguf", ".zip", ".tar", ".gz", ".onnx")

Where = Path | str  # of a reference cache: a directory, or the URL of a place in an object store


def local_path(where: Where) -> Path | None:
    """The directory that it names, by path or as `file:///path`; None if it lies in an object store."""
    if isinstance(where, Path) or "://" not in where:
        return Path(where)
    parts = urlsplit(where)
    if parts.scheme != "file":
        return None
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise ConfigError(f"{where}: expected file:///a/path with three slashes, or just the path")
    return Path(unquote(parts.path))


def different(places: Iterable[Where]) -> bool:
    """Whether no two of them are one place."""
    named = [(place, local_path(place)) for place in places]
    return len({path.resolve() if path else str(url).rstrip("/") for url, path in named}) == len(named)


def one_of(option: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option}: expected one of {', '.join(filter(None, allowed))}, got {value!r}")


def split_share(shard: str | None) -> tuple[int, int]:
    """K and N of "K/N": a job's number, from 1, and how many there are; (1, 1) without one. Raises ConfigError: nonsense."""
    parts = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", shard if shard is not None else "1/1")
    number, of = (int(parts[1]), int(parts[2])) if parts else (0, 0)
    if not 1 <= number <= of:
        raise ConfigError(f"--shard: expected K/N with K from 1 to N, as 3/64, got {shard!r}")
    return number, of


def at_least(option: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise ConfigError(f"{option}: expected {least} or more, got {value}")


def at_most(option: str, value: float | None, most: float) -> None:
    if value is not None and not value <= most:
        raise ConfigError(f"{option}: expected {most} or less, got {value}")


def above_zero(option: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"{option}: expected a number above 0, got {value}")


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


@dataclass(frozen=True)
class EvaluateConfig:
    """A policy against a cache. `policy` is a run directory, a model directory, a hub id or a file.

    loss, logps, beta: None takes what the run was trained with, or `TrainConfig`'s default where there is no run. scratch: as
    `TrainConfig`'s.
    """

    policy: str
    ref_cache: Where
    loss: str | None = None
    logps: str | None = None
    beta: float | None = None
    dtype: str = "auto"
    tokens_per_batch: int | None = None
    scratch: Path | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        one_of("--logps", self.logps, (*LOGPS, None))
        one_of("--dtype", self.dtype, DTYPES)
        above_zero("--beta", self.beta)
        at_least("--tokens-per-batch", self.tokens_per_batch, 1)


@dataclass(frozen=True)
class InspectConfig:
    """Looking at a cache. `pair` is a position in it, from 0; `model` is only used to verify; `plot` is a picture to draw,
    `html` a page to write.
    """

    ref_cache: Where
    pair: int | None = None
    verify: bool = False
    model: str | None = None
    plot: Path | None = None
    html: Path | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        at_least("--pair", self.pair, 0)
        if self.html and (self.verify or self.pair is not None):
            raise ConfigError("--html: shows the whole cache; expected it without --pair and --verify")
        if self.plot and (self.verify or self.pair is not None):
            raise ConfigError("--plot: draws the whole cache; expected it without --pair and --verify")
        if self.model and not self.verify:
            raise ConfigError("--model: is used by --verify only; expected both, got --model alone")


@dataclass(frozen=True)
class MergeConfig:
    """Several caches of one identity as one, `ref_cache`, which must not exist yet."""

    caches: tuple[Where, ...]
    ref_cache: Where

    def __post_init__(self) -> None:
        if len(self.caches) < 2 or not different(self.caches):
            raise ConfigError(
                f"merge: expected two different caches or more, got {', '.join(map(str, self.caches)) or 'none'}"
            )


@dataclass(frozen=True)
class CompareConfig:
    """Reference and policy answer the same prompts.

    prompt: texts. prompts: a file of them. ref_cache: the prompts of `pairs` of its pairs (None: 16), evenly spread.
    system: opens every conversation that has no system turn of its own. temperature: 0 is greedy.
    seed: of sampling, and of which answer is called A on the page. batch_size: prompts answered at once.
    """

    policy: str
    reference: str | None = None
    prompts: Path | None = None
    prompt: tuple[str, ...] = ()
    ref_cache: Where | None = None
    pairs: int | None = None
    system: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42
    batch_size: int = 8
    jsonl: Path | None = None
    html: Path | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        at_least("--max-new-tokens", self.max_new_tokens, 1)
        if not self.prompts and not self.prompt and not self.ref_cache:
            raise ConfigError("compare: expected --prompt TEXT, --prompts FILE or --ref-cache CACHE, got none of them")
        if not all(text.strip() for text in self.prompt):
            raise ConfigError("--prompt: expected some text, got none")
        at_least("--pairs", self.pairs, 1)
        if self.pairs and not self.ref_cache:
            raise ConfigError("--pairs: says how many of a cache's prompts to take; expected --ref-cache beside it")
        if self.system and self.ref_cache:
            raise ConfigError(
                "--system: the prompts of --ref-cache are tokens already; use it with --prompt, --prompts"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature: expected 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p: expected a share above 0 up to 1, got {self.top_p}")
        if self.top_p < 1 and not self.temperature:
            raise ConfigError("--top-p: does nothing to greedy answers; expected --temperature above 0 beside it")
        at_least("--seed", self.seed, 0)
        at_least("--batch-size", self.batch_size, 1)
        named = [file.absolute() for file in (self.prompts, self.jsonl, self.html) if file]
        if len(set(named)) < len(named):
            raise ConfigError("--prompts, --jsonl, --html: expected different files, got one twice")


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


@dataclass(frozen=True)
class ReportConfig:
    """A run as a page. out: None is report.html in the run. answers: of `compare --jsonl`; None: those in the run, if any."""

    run: Path
    out: Path | None = None
    answers: Path | None = None


@dataclass(frozen=True)
class PlotConfig:
    """Curves of runs as a picture. out: None is curves.png, in the run if there is one run, else in the working directory.

    smooth: weight of the past in a running mean, from 0 (as logged) to below 1.
    """

    runs: tuple[Path, ...]
    out: Path | None = None
    smooth: float = 0.0

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("plot: expected a run directory, got none")
        if not 0 <= self.smooth < 1:
            raise ConfigError(f"--smooth: expected 0 (as logged) to below 1, got {self.smooth}")
