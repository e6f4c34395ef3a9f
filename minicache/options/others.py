"""Options of the commands that look at caches and policies."""

from dataclasses import dataclass
from pathlib import Path

from minicache.errors import ConfigError
from minicache.options.checks import above_zero, at_least, one_of
from minicache.options.choices import DTYPES, LOGPS
from minicache.options.where import Where, different


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
