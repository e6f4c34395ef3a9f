"""Options of the commands that look at caches, runs and policies."""

from dataclasses import dataclass
from pathlib import Path

from minicache.data.arguments import parse_arguments, require_date
from minicache.data.columns import Reading
from minicache.errors import ConfigError
from minicache.options import texts
from minicache.options.choices import DTYPES, LOGPS
from minicache.options.declare import check_options, flag, needed, option
from minicache.options.judge import NO_JUDGE, JudgeOptions
from minicache.options.where import Where, different, require_writable

CACHE_ARGUMENT = "A reference cache: a directory or a URL."


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of `evaluate`. loss, logps, beta: None is the value of the policy's run, or train's default without a run."""

    policy: str = needed("A run directory, model directory, hub id or file.")
    ref_cache: Where = needed(texts.READ_CACHE, metavar="PATH")
    loss: str | None = option(None, "As for train. (Default: the run's.)")
    logps: str | None = option(None, "{names}. (Default: the run's.)", choices=lambda: LOGPS)
    beta: float | None = option(None, "As for train. (Default: the run's.)", above=0)
    dtype: str = option("auto", texts.DTYPE, choices=lambda: DTYPES)
    tokens_per_batch: int | None = option(None, texts.TOKENS_PER_BATCH, least=1)
    scratch: Path | None = option(None, texts.SCRATCH)
    trust_remote_code: bool = option(False, texts.TRUST)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class InspectConfig:
    """Options of `inspect-cache`. pair: an index in the cache. model: only used with `verify`."""

    ref_cache: Where = needed("The reference cache: a directory or a URL.", argument=True)
    pair: int | None = option(None, "Show the pair with this index (from 0), decoded.", least=0)
    verify: bool = option(False, "Re-read everything and check every digest.")
    model: str | None = option(None, "With --verify: also re-score a sample with this model.")
    plot: Path | None = option(None, "Also draw the histograms to this file: png, svg or pdf.")
    html: Path | None = option(None, "Also write all this as an HTML page to this file, replacing it.")
    trust_remote_code: bool = option(False, texts.TRUST)

    def __post_init__(self) -> None:
        check_options(self)
        for name, what in (("html", "shows"), ("plot", "draws")):
            if getattr(self, name) and (self.verify or self.pair is not None):
                raise ConfigError(f"--{name}: {what} the whole cache; expected it without --pair and --verify")
        if self.verify and self.pair is not None:
            raise ConfigError("--pair: --verify checks all pairs; expected one of the two, got both")
        if self.model and not self.verify:
            raise ConfigError("--model: is used by --verify only; expected both, got --model alone")
        if self.trust_remote_code and not self.model:
            raise ConfigError("--trust-remote-code: is about the code of --model; expected both, got it alone")


@dataclass(frozen=True)
class MergeConfig:
    """Options of `merge`. caches: several with one identity. ref_cache: the merged cache, which must not exist yet."""

    caches: tuple[Where, ...] = needed(
        "Complete reference caches of one model, tokenizer and options.", argument=True, metavar="CACHES..."
    )
    ref_cache: Where = needed("The reference cache to create: a directory or a URL.", metavar="PATH")

    def __post_init__(self) -> None:
        require_writable(self.ref_cache)
        if len(self.caches) < 2 or not different(self.caches):
            raise ConfigError(
                f"merge: expected two different caches or more, got {', '.join(map(str, self.caches)) or 'none'}"
            )


@dataclass(frozen=True)
class DiffConfig:
    """Options of `diff`: two caches to compare."""

    a: Where = needed(CACHE_ARGUMENT, argument=True, metavar="CACHE")
    b: Where = needed(CACHE_ARGUMENT, argument=True, metavar="CACHE")


@dataclass(frozen=True)
class CompareConfig:
    """Options of `compare`: reference and policy answer prompts from texts, from a file, or from pairs of a cache.

    system: the system turn of conversations without one. seed: of sampling, and of which answer is called A.
    """

    policy: str = needed("A run directory, one of its checkpoints, or a model directory.")
    reference: str | None = option(None, "The model to compare with. (Default: what the run started from.)")
    prompt: tuple[str, ...] = option((), "A prompt; may be given several times.")
    prompts: Where | None = option(
        None,
        "A file: one prompt per line, or rows of prompts or messages, named and formed as for precompute-ref.",
        metavar="FILE",
    )
    ref_cache: Where | None = option(None, "Take prompts from the pairs of this cache.", metavar="PATH")
    columns: str = option("", "As for precompute-ref, for --prompts.", metavar="NAME=COLUMN,…")
    ignore_fields: str = option("", "As for precompute-ref, for --prompts.", metavar="NAME,…")
    template_arg: tuple[str, ...] = option(
        (), "As for precompute-ref. (Default: as in the policy's run.)", metavar="NAME=VALUE"
    )
    date: str = option("", "As for precompute-ref. (Default: as in the policy's run.)", metavar="DATE")
    pairs: int | None = option(None, "Number of those pairs, evenly spread. (Default: 16.)", least=1)
    system: str | None = option(None, "System turn of conversations without one.")
    max_new_tokens: int = option(128, "Most tokens of an answer.", least=1)
    temperature: float = option(0.0, "0: always the likeliest token; above 0: sampled.", least=0)
    top_p: float = option(1.0, "Sample from the likeliest tokens with this total probability.", above=0, most=1)
    seed: int = option(42, "Seed of sampling, and of which answer is A on the page.", least=0, most=2**63 - 1)
    batch_size: int = option(8, "Prompts answered at once.", least=1)
    jsonl: Path | None = option(None, "Write one object per prompt to this file, replacing it.")
    html: Path | None = option(None, "Write an HTML page for blind votes to this file, replacing it.")
    trust_remote_code: bool = option(False, texts.TRUST)
    judging: JudgeOptions = NO_JUDGE

    def __post_init__(self) -> None:
        check_options(self)
        self.reading.require_sound()
        require_date(self.date)
        parse_arguments(self.template_arg)
        for name in ("columns", "ignore_fields"):
            if getattr(self, name) and not self.prompts:
                raise ConfigError(
                    f"{flag(name)}: is about the rows of --prompts; expected both, got {flag(name)} alone"
                )
        if not self.prompts and not self.prompt and not self.ref_cache:
            raise ConfigError("compare: expected --prompt TEXT, --prompts FILE or --ref-cache CACHE, got none of them")
        if not all(text.strip() for text in self.prompt):
            raise ConfigError("--prompt: expected some text, got none")
        if self.pairs and not self.ref_cache:
            raise ConfigError("--pairs: is the number of prompts from --ref-cache; expected both, got --pairs alone")
        if self.system and self.ref_cache:
            raise ConfigError(
                "--system: the prompts of --ref-cache are tokens already; use it with --prompt, --prompts"
            )
        if self.top_p < 1 and not self.temperature:
            raise ConfigError("--top-p: does nothing to greedy answers; expected --temperature above 0 with it")
        files = (self.prompts, self.jsonl, self.html, self.judging.verdicts)
        named = [Path(file).absolute() for file in files if file]
        if len(set(named)) < len(named):
            raise ConfigError("--prompts, --jsonl, --html, --verdicts: expected different files, got one twice")

    @property
    def reading(self) -> Reading:
        """How the rows of --prompts become prompts."""
        return Reading(columns=self.columns, ignore_fields=self.ignore_fields)


@dataclass(frozen=True)
class ReportConfig:
    """Options of `report`: a run as an HTML page."""

    run: Path = needed("The run directory.", argument=True)
    out: Path | None = option(None, "The page, replaced if it exists. (Default: report.html in the run.)")
    answers: Path | None = option(
        None, "The file of compare --jsonl. (Default: answers.jsonl or compare.jsonl in the run.)"
    )


@dataclass(frozen=True)
class PlotConfig:
    """Options of `plot`: curves of runs as a picture. smooth: weight of the past in a running mean."""

    runs: tuple[Path, ...] = needed("Run directories; the curves of several share axes.", argument=True)
    out: Path | None = option(None, "A png, svg or pdf, replaced if it exists. (Default: curves.png in the run.)")
    smooth: float = option(0.0, "0: as logged; closer to 1: smoother.", least=0, below=1)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("plot: expected a run directory, got none")
        check_options(self)
