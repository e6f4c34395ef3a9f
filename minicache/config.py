"""Every option once, with its default and its check. Frozen; no torch.

A stage gets one of these and nothing else to decide by. A value that cannot work is a `ConfigError` at construction, before
any file is opened or model loaded.
"""

from dataclasses import dataclass
from pathlib import Path

from minicache.errors import ConfigError

FORMATS = ("auto", "messages", "prompt", "stack-exchange", "sharegpt", "hh")
TRUNCATE = ("right", "left", "refuse")
LOSS_ON = ("response", "assistant")
DTYPES = ("auto", "bfloat16", "float16", "float32")
ON_BAD_ROW = ("skip", "fail")
THINK = ("keep", "drop")
LOGPS = ("mean", "sum")


def one_of(option: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option}: expected one of {', '.join(filter(None, allowed))}, got {value!r}")


def at_least(option: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise ConfigError(f"{option}: expected {least} or more, got {value}")


def above_zero(option: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"{option}: expected a number above 0, got {value}")


@dataclass(frozen=True)
class PrecomputeConfig:
    """Stage one. `model` and `tokenizer` are a directory, a hub id or a file; sizes are in tokens or pairs.

    think: whether an empty think block that the chat template writes is kept or dropped.
    """

    model: str
    data: tuple[str, ...]
    ref_cache: Path
    tokenizer: str | None = None
    chat_template: Path | None = None
    format: str = "auto"
    max_length: int = 1024
    truncate: str = "right"
    loss_on: str = "response"
    think: str = "keep"
    dtype: str = "auto"
    block_pairs: int | None = None
    tokens_per_batch: int = 16384
    per_token: bool = False
    on_bad_row: str = "skip"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("--data: expected at least one preference file, got none")
        one_of("--format", self.format, FORMATS)
        at_least("--max-length", self.max_length, 2)
        one_of("--truncate", self.truncate, TRUNCATE)
        one_of("--loss-on", self.loss_on, LOSS_ON)
        one_of("--think", self.think, THINK)
        one_of("--dtype", self.dtype, DTYPES)
        at_least("--block-pairs", self.block_pairs, 1)
        at_least("--tokens-per-batch", self.tokens_per_batch, 1)
        one_of("--on-bad-row", self.on_bad_row, ON_BAD_ROW)


@dataclass(frozen=True)
class EvaluateConfig:
    """A policy against a cache. `policy` is a run directory, a model directory, a hub id or a file.

    loss, logps, beta: None takes what the run was trained with, or `TrainConfig`'s default where there is no run.
    """

    policy: str
    ref_cache: Path
    loss: str | None = None
    logps: str | None = None
    beta: float | None = None
    dtype: str = "auto"
    tokens_per_batch: int = 16384
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        one_of("--logps", self.logps, (*LOGPS, None))
        one_of("--dtype", self.dtype, DTYPES)
        above_zero("--beta", self.beta)
        at_least("--tokens-per-batch", self.tokens_per_batch, 1)


@dataclass(frozen=True)
class InspectConfig:
    """Looking at a cache. `pair` is a position in it, from 0; `model` is only used to verify."""

    ref_cache: Path
    pair: int | None = None
    verify: bool = False
    model: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        at_least("--pair", self.pair, 0)
        if self.model and not self.verify:
            raise ConfigError("--model: is used by --verify only; expected both, got --model alone")


@dataclass(frozen=True)
class CompareConfig:
    """Reference and policy answer the same prompts, greedily. `prompts` has one prompt a line; `prompt` is one."""

    policy: str
    reference: str | None = None
    prompts: Path | None = None
    prompt: tuple[str, ...] = ()
    max_new_tokens: int = 128
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        at_least("--max-new-tokens", self.max_new_tokens, 1)
        if not self.prompts and not self.prompt:
            raise ConfigError("compare: expected --prompt TEXT or --prompts FILE, got neither")
