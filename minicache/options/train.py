"""Options of `train`."""

from dataclasses import dataclass, replace
from pathlib import Path

from minicache.data.columns import Reading
from minicache.errors import ConfigError
from minicache.options import texts
from minicache.options.base import AS_STORED, BaseOptions, flag_of
from minicache.options.catalog import OPTIMIZERS, SCHEDULES, WEIGHTS, names_of
from minicache.options.checks import check_caches, check_weights
from minicache.options.choices import DTYPES, LOGPS, ON_MAX_KL, PAIRS, PARALLEL, formats, layout_help, layouts
from minicache.options.declare import check_options, needed, option, options_of
from minicache.options.lora import NO_LORA
from minicache.options.lora import LoraOptions as LoraOptions
from minicache.options.loss import BETAS, LOSS, PLAIN_LOSS
from minicache.options.loss import LossOptions as LossOptions
from minicache.options.validation import NO_VALIDATION, VALIDATION
from minicache.options.validation import ValidationOptions as ValidationOptions
from minicache.options.where import Where, split_weight
from minicache.trackers import TRACKERS

OPTIMIZER, MEMORY, LOGS = "Optimizer", "Memory and speed", "Checkpoints and logs"


@dataclass(frozen=True)
class TrainConfig:
    """Options of stage two.

    ref_cache: one or several; either all have a weight behind a colon, the share of an epoch's pairs, or none has.
    batch_size: pairs per optimizer step, over all processes.
    beta: None is the default for `logps`, or what a resumed run has.
    balance: None is the weight in the model's configuration, or what a resumed run has.
    save_dtype: half precision loses small updates; auto is the precision of the weights that the run started from.
    """

    ref_cache: Where | tuple[Where, ...] = needed(
        "The reference cache, or several of one kind with their shares of an epoch (a/:0.7 --ref-cache b/:0.3). Needed, "
        "except with --resume.",
        metavar="PATH[:WEIGHT]",
        movable=True,
    )
    out: Path = needed("The run directory to create, or to continue with --resume.", movable=True)
    data: tuple[str, ...] = option(
        (), "Train only on the pairs of these preference files; the cache must hold them.", movable=True
    )
    format: str = option("auto", "Row format of --data, as for precompute-ref.", choices=formats, movable=True)
    columns: str = option("", "As for precompute-ref, for --data.", metavar="NAME=COLUMN,…", movable=True)
    ignore_fields: str = option("", "As for precompute-ref, for --data.", metavar="NAME,…", movable=True)
    row_pairs: str | None = option(
        None, "As for precompute-ref, for --data.", shown="--pairs", choices=lambda: PAIRS, movable=True
    )
    model: str | None = option(
        None,
        "Where the reference's weights are now. (Default: where stage one found them.)",
        movable=True,
    )
    init_from: str | None = option(None, "Start from these weights instead of the reference's.")
    resume: bool = option(False, "Continue from the run's newest checkpoint, with the run's own options.", movable=True)
    epochs: float = option(1.0, "Passes over the data; may be a fraction.", above=0)
    max_steps: int | None = option(None, "Number of optimizer steps; overrides --epochs.", least=1)
    batch_size: int = option(32, "Pairs per optimizer step, over all processes.", least=1)
    seed: int = option(42, "Seed of the order of pairs, and of new adapters.", least=0, most=2**63 - 1)
    loss: str = option(
        "sigmoid",
        "Preference loss (docs/training.md lists them), or several: sigmoid:0.8,hinge:0.2.",
        panel=LOSS,
    )
    logps: str = option(
        "mean",
        "Compare logprobs as 'mean' per token (MiniMind until 2510) or as 'sum' (DPO paper, TRL, MiniMind 3).",
        panel=LOSS,
        choices=lambda: LOGPS,
    )
    beta: float | None = option(
        None,
        f"The higher, the closer the policy stays to the reference. (Default: {BETAS['mean']:g} with --logps mean, "
        f"{BETAS['sum']:g} with sum.)",
        panel=LOSS,
        above=0,
    )
    beta_end: float | None = option(
        None, "Beta at the last step; it changes linearly from --beta.", panel=LOSS, above=0
    )
    balance: float | None = option(
        None,
        "Weight of the loss that balances the load of a mixture's experts; 0: none. (Default: the model's own.)",
        panel=LOSS,
        least=0,
    )
    loss_options: LossOptions = PLAIN_LOSS
    lr: float = option(1e-6, "Peak learning rate.", panel=OPTIMIZER, above=0)
    schedule: str = option("cosine", "Learning-rate schedule: {names}.", panel=OPTIMIZER, choices=names_of(SCHEDULES))
    min_lr: float = option(
        0.0,
        "Final learning rate of cosine and linear, as a share of --lr.",
        panel=OPTIMIZER,
        what="a share",
        least=0,
        most=1,
    )
    warmup: float = option(
        0.1,
        "Steps of linear warm-up: below 1 a share of all steps, else a number.",
        panel=OPTIMIZER,
        least=0,
    )
    optimizer: str = option(
        "adamw",
        "{names}: state in 8 bits, in memory that CUDA pages (both bitsandbytes), or with the whole update on the CPU (torchao).",
        panel=OPTIMIZER,
        choices=names_of(OPTIMIZERS),
    )
    weight_decay: float = option(0.0, "Weight decay of AdamW, on matrices only.", panel=OPTIMIZER, least=0)
    decay_norms: bool = option(False, "Weight decay of norms and biases too.", panel=OPTIMIZER)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0: no clipping.", panel=OPTIMIZER, least=0)
    lora: LoraOptions = NO_LORA
    base: BaseOptions = AS_STORED
    weights: str = option("float32", texts.WEIGHTS, panel=MEMORY, choices=lambda: tuple(WEIGHTS))
    dtype: str = option("auto", texts.DTYPE, panel=MEMORY, choices=lambda: DTYPES)
    layout: str = option("auto", layout_help(), panel=MEMORY, choices=layouts)
    parallel: str = option("ddp", texts.PARALLEL, panel=MEMORY, choices=lambda: PARALLEL, movable=True)
    tokens_per_micro_batch: int | None = option(
        None,
        "Token slots of a micro-batch; accumulation follows from it. (Default: as many as fit in memory.)",
        panel=MEMORY,
        least=1,
        movable=True,
    )
    scratch: Path | None = option(None, texts.SCRATCH, panel=MEMORY, movable=True)
    activation_checkpointing: bool = option(
        False, "Compute layers again in backward: less memory, a third more time.", panel=MEMORY, movable=True
    )
    selective_checkpointing: bool = option(
        False, "The same, but only of the layers whose activations do not fit in memory.", panel=MEMORY, movable=True
    )
    compile: bool = option(False, texts.COMPILE, panel=MEMORY)
    validation: ValidationOptions = NO_VALIDATION
    max_kl: float | None = option(
        None,
        "Largest distance of the policy from the reference, nats per token: of kl_tokens where the cache has --per-token, else kl.",
        panel=VALIDATION,
        above=0,
    )
    on_max_kl: str = option(
        "warn", "What happens above --max-kl: {names}.", panel=VALIDATION, choices=lambda: ON_MAX_KL
    )
    save_every: int = option(500, "Steps between checkpoints; 0: none.", panel=LOGS, least=0, movable=True)
    keep_last: int = option(1, "Number of checkpoints to keep, beside the best.", panel=LOGS, least=1, movable=True)
    async_save: bool = option(
        False,
        "Write checkpoints while training continues, from a copy in the CPU's memory.",
        panel=LOGS,
        movable=True,
    )
    save_dtype: str = option(
        "float32",
        "Precision of the final model: float32 (as trained), bfloat16, float16, or auto (as it was stored before).",
        panel=LOGS,
        choices=lambda: DTYPES,
        movable=True,
    )
    log_every: int = option(10, "Steps between log lines.", panel=LOGS, least=1)
    tracker: tuple[str, ...] = option(
        (),
        "Also log to {names}; may be given several times.",
        panel=LOGS,
        choices=lambda: tuple(TRACKERS),
        movable=True,
    )
    trust_remote_code: bool = option(False, texts.TRUST, movable=True)

    def __post_init__(self) -> None:
        check_caches(self.caches)
        check_options(self)
        self.reading.require_sound()
        if (quantization := self.base.quantization) and not self.lora.wanted:
            raise ConfigError(
                f"{flag_of(quantization)}: quantized weights cannot be trained, adapters on them can; add --lora-rank 16"
            )
        if self.activation_checkpointing and self.selective_checkpointing:
            raise ConfigError("--selective-checkpointing: expected it or --activation-checkpointing, got both")
        check_weights(self.weights, self.optimizer, self.lora.wanted)
        if self.on_max_kl != "warn" and self.max_kl is None:
            raise ConfigError("--on-max-kl: is used with --max-kl only; expected both, got --on-max-kl alone")
        if self.warmup > 1 and self.warmup % 1:
            raise ConfigError(
                f"--warmup: expected a share of the steps below 1, or a number of steps, got {self.warmup}"
            )

    @property
    def checkpoints_layers(self) -> bool:
        """Whether layers are computed again in backward: all, or those whose activations do not fit."""
        return self.activation_checkpointing or self.selective_checkpointing

    def settled(self) -> "TrainConfig":
        """The config with the defaults that follow from other options."""
        return replace(self, beta=BETAS[self.logps]) if self.beta is None else self

    @property
    def reading(self) -> Reading:
        """How the rows of --data become pairs."""
        return Reading(self.format, self.columns, self.ignore_fields, self.row_pairs or "")

    @property
    def caches(self) -> list[tuple[Where, float | None]]:
        """The path or URL of each reference cache, and its weight, if it has one."""
        several = self.ref_cache if isinstance(self.ref_cache, tuple | list) else (self.ref_cache,)
        return [split_weight(where) for where in several]


# Options that may change when a run is resumed: paths, and options that change no number.
MOVABLE = {item.name for item, declared in options_of(TrainConfig) if declared.movable}
