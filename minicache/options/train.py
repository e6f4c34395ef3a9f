"""Options of `train`."""

import re
from dataclasses import dataclass
from pathlib import Path

from minicache.errors import ConfigError
from minicache.options.checks import above_zero, at_least, one_of, share
from minicache.options.choices import (
    DTYPES,
    F_DIVERGENCES,
    FORMATS,
    LAYOUTS,
    LOGPS,
    ON_MAX_KL,
    OPTIMIZERS,
    PARALLEL,
    SCHEDULES,
    TRACKERS,
)
from minicache.options.dictionaries import option
from minicache.options.where import Where, different, split_weight

# What a resumed run may be given anew: where things lie now, and what changes no number.
MOVABLE = {
    "out",
    "ref_cache",
    "data",
    "format",
    "eval_cache",
    "model",
    "resume",
    "save_every",
    "keep_last",
    "save_dtype",
    "trust_remote_code",
    "tracker",
    "tokens_per_micro_batch",
    "scratch",
    "parallel",
    "async_save",
}


@dataclass(frozen=True)
class LossOptions:
    """What some losses ask for beside beta.

    label_smoothing: the share of labels taken to be flipped (sigmoid, robust, exo_pair, aot, aot_unpaired).
    f_divergence, f_alpha: what takes the place of the log ratio in losses on the difference of the sides.
    sft_weight: weight of the chosen answers' negative log likelihood beside the preference loss.
    wpo: weight pairs by how likely the policy itself would write them. ld_alpha: weight of an answer's tokens beyond the length
    of the other's.
    """

    label_smoothing: float = 0.0
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    sft_weight: float = 0.0
    wpo: bool = False
    ld_alpha: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"--label-smoothing: expected 0 to below 0.5, got {self.label_smoothing}")
        one_of("--f-divergence", self.f_divergence, F_DIVERGENCES)
        above_zero("--discopop-tau", self.discopop_tau)
        at_least("--sft-weight", self.sft_weight, 0)
        share("--ld-alpha", self.ld_alpha)


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters instead of all weights. lora_rank 0: none. lora_alpha: None is twice the rank.

    lora_targets: 'all-linear', or the names of modules, separated by commas.
    """

    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: str = "all-linear"

    def __post_init__(self) -> None:
        at_least("--lora-rank", self.lora_rank, 0)
        above_zero("--lora-alpha", self.lora_alpha)
        if not self.lora_rank:
            for name in ("lora_alpha", "lora_targets"):
                if getattr(self, name) != getattr(LoraOptions, name):
                    raise ConfigError(
                        f"{option(name)}: is used with --lora-rank only; expected both, got {option(name)} alone"
                    )


@dataclass(frozen=True)
class ValidationOptions:
    """Pairs that are not trained on, scored every so many steps.

    holdout: share of the pairs, chosen by their digests, so that a pair falls on the same side in every run. eval_cache: another
    reference cache instead. eval_every: steps between validations; None is ten in a run.
    patience: validations without a loss lower by more than `min_gain` after which the run ends.
    """

    holdout: float = 0.0
    eval_cache: Where | None = None
    eval_every: int | None = None
    patience: int | None = None
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"--holdout: expected a share of the pairs from 0 to below 1, got {self.holdout}")
        at_least("--eval-every", self.eval_every, 1)
        at_least("--patience", self.patience, 1)
        at_least("--min-gain", self.min_gain, 0)
        if self.holdout and self.eval_cache:
            raise ConfigError("--holdout, --eval-cache: expected one of them, got both")
        if not self.wanted and (self.patience or self.eval_every):
            raise ConfigError(
                "--patience and --eval-every need pairs to validate on: add --holdout 0.05 or --eval-cache"
            )

        if self.min_gain and not self.patience:
            raise ConfigError("--min-gain: is used with --patience only; expected both, got --min-gain alone")

    @property
    def wanted(self) -> bool:
        return bool(self.holdout or self.eval_cache)


@dataclass(frozen=True)
class TrainConfig:
    """Stage two. `batch_size` is in pairs per optimizer step over all processes.

    ref_cache: one or several; all with a weight behind a colon, the share in an epoch's pairs, or none. data: train on the pairs of
    these preference files alone, read as `format`; the caches must hold them.
    warmup: below 1 a share of the steps, else a number of them. min_lr: share of `lr` that the schedule ends at.
    beta_end: beta changes linearly to this over the run. max_kl: nats a token; on_max_kl: what happens above.
    model: where the reference's weights lie now, if not where stage one found them. init_from: start from other weights.
    save_every: steps between checkpoints, 0 for none; keep_last: how many of them stay. save_dtype: of the final model; small
    updates are lost in half precision. auto: the precision that the weights it started from were stored in.
    tokens_per_micro_batch: token slots at once; None is what fits in memory. scratch: a directory where the pairs are decoded into
    a file that all processes map; None does so only where they do not fit in memory.
    """

    ref_cache: Where | tuple[Where, ...]
    out: Path
    data: tuple[str, ...] = ()
    format: str = "auto"
    model: str | None = None
    init_from: str | None = None
    resume: bool = False
    loss: str = "sigmoid"
    loss_options: LossOptions = LossOptions()
    logps: str = "mean"
    beta: float = 0.1
    beta_end: float | None = None
    lr: float = 1e-6
    schedule: str = "cosine"
    min_lr: float = 0.0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    warmup: float = 0.1
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 32
    layout: str = "auto"
    parallel: str = "ddp"
    tokens_per_micro_batch: int | None = None
    scratch: Path | None = None
    max_grad_norm: float = 1.0
    seed: int = 42
    dtype: str = "auto"
    lora: LoraOptions = LoraOptions()
    compile: bool = False
    activation_checkpointing: bool = False
    validation: ValidationOptions = ValidationOptions()
    max_kl: float | None = None
    on_max_kl: str = "warn"
    save_every: int = 500
    keep_last: int = 1
    async_save: bool = False
    save_dtype: str = "float32"
    log_every: int = 10
    tracker: tuple[str, ...] = ()
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_caches(self.caches)
        one_of("--format", self.format, FORMATS)
        one_of("--logps", self.logps, LOGPS)
        one_of("--dtype", self.dtype, DTYPES)
        one_of("--layout", self.layout, LAYOUTS)
        one_of("--parallel", self.parallel, PARALLEL)
        one_of("--save-dtype", self.save_dtype, DTYPES)
        one_of("--schedule", self.schedule, SCHEDULES)
        one_of("--optimizer", self.optimizer, OPTIMIZERS)
        one_of("--on-max-kl", self.on_max_kl, ON_MAX_KL)
        for name in ("beta", "beta_end", "lr", "epochs", "max_grad_norm", "max_kl"):
            above_zero(option(name), getattr(self, name))
        for name in ("max_steps", "batch_size", "tokens_per_micro_batch", "log_every", "keep_last"):
            at_least(option(name), getattr(self, name), 1)
        for name in ("weight_decay", "seed", "save_every"):
            at_least(option(name), getattr(self, name), 0)
        share("--min-lr", self.min_lr)
        for name in self.tracker:
            one_of("--tracker", name, TRACKERS)
        if self.on_max_kl != "warn" and self.max_kl is None:
            raise ConfigError("--on-max-kl: says what happens above --max-kl; expected both, got --on-max-kl alone")
        if not 0 <= self.warmup < float("inf") or (self.warmup > 1 and self.warmup % 1):
            raise ConfigError(
                f"--warmup: expected a share of the steps below 1, or a number of steps, got {self.warmup}"
            )

    @property
    def caches(self) -> list[tuple[Where, float | None]]:
        """Where each reference cache is, and its weight, if it has one."""
        several = self.ref_cache if isinstance(self.ref_cache, tuple | list) else (self.ref_cache,)
        return [split_weight(where) for where in several]


def check_caches(caches: list[tuple[Where, float | None]]) -> None:
    weights = [weight for _, weight in caches]
    for where, weight in caches:
        path, _, rest = str(where).rpartition(":")
        if weight is None and path and re.fullmatch(r"-[0-9.e-]+|nan|inf", rest):
            raise ConfigError(f"--ref-cache {where}: expected a weight above 0, got {rest}")
    if len(caches) == 1 and weights[0] is not None:
        raise ConfigError(
            "--ref-cache: a weight is a share beside other caches; expected several, or one without a weight"
        )
    if None in weights and any(weights):
        raise ConfigError("--ref-cache: expected a weight for each cache (a/:0.7 b/:0.3) or for none, got some without")
    if 0 in weights:
        raise ConfigError("--ref-cache: a weight of 0 takes no pairs; expected one above 0, or leave the cache out")
    if not different(where for where, _ in caches):
        raise ConfigError("--ref-cache: one cache is named twice; expected different ones")
