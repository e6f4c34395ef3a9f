"""`minidpo train`: its options."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from minicache.commands.running import (
    DTYPE_HELP,
    LAYOUT_HELP,
    NPROC_HELP,
    PARALLEL_HELP,
    SCRATCH_HELP,
    Recipe,
    Trust,
    errors_as_one_line,
    given_by_user,
    run_stage,
)
from minicache.errors import OutputError
from minicache.options.choices import SCHEDULES, TRACKERS
from minicache.options.dictionaries import fill
from minicache.options.recipes import recipe as preset
from minicache.options.train import LoraOptions, LossOptions, TrainConfig, ValidationOptions
from minicache.screen.results import show_train
from minicache.training.run_directory import run_facts

LOSS_HELP = "Preference loss (docs/training.md lists them), or several: sigmoid:0.8,hinge:0.2."
LOGPS_HELP = "Compare logprobs as 'mean' a token (MiniMind till 2510) or as 'sum' (DPO paper, TRL, MiniMind 3)."
BETA_HELP = "The higher, the closer the policy stays to the reference. Suits one --logps, not both."
# options by the panel of --help that they stand in
loss_option = partial(typer.Option, rich_help_panel="Loss")
optimizer_option = partial(typer.Option, rich_help_panel="Optimizer")
lora_option = partial(typer.Option, rich_help_panel="LoRA")
memory_option = partial(typer.Option, rich_help_panel="Memory and speed")
validation_option = partial(typer.Option, rich_help_panel="Validation")
log_option = partial(typer.Option, rich_help_panel="Checkpoints and logs")


def train(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="The run directory to make, or with --resume to go on with.")],
    ref_cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:WEIGHT]",
            help="The reference cache, or several of one kind (a/:0.7 --ref-cache b/:0.3: their shares in an epoch). Needed unless "
            "--resume knows it from the run.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Train on the pairs of these preference files alone; the cache must hold them."),
    ] = None,
    format: Annotated[str, typer.Option(help="Of --data, as precompute-ref takes it.")] = TrainConfig.format,
    model: Annotated[
        str | None, typer.Option(help="Where the reference's weights are now. (Default: where stage one found them.)")
    ] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Start from other weights than the reference's, on purpose.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's newest checkpoint, with the run's own options.")
    ] = False,
    recipe: Recipe = None,
    epochs: Annotated[float, typer.Option(help="Times over the data; fractions too.")] = TrainConfig.epochs,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, whatever --epochs says.")] = None,
    batch_size: Annotated[
        int, typer.Option(help="Pairs an optimizer step, over all processes.")
    ] = TrainConfig.batch_size,
    seed: Annotated[int, typer.Option(help="Seed of the order of pairs, and of new adapters.")] = TrainConfig.seed,
    loss: Annotated[str, loss_option(help=LOSS_HELP)] = TrainConfig.loss,
    logps: Annotated[str, loss_option(help=LOGPS_HELP)] = TrainConfig.logps,
    beta: Annotated[float, loss_option(help=BETA_HELP)] = TrainConfig.beta,
    beta_end: Annotated[float | None, loss_option(help="Beta at the last step; it changes linearly.")] = None,
    label_smoothing: Annotated[
        float, loss_option(help="Share of labels taken to be flipped.")
    ] = LossOptions.label_smoothing,
    f_divergence: Annotated[str, loss_option(help="reverse_kl, forward_kl, js or alpha.")] = LossOptions.f_divergence,
    f_alpha: Annotated[float, loss_option(help="Its alpha, for --f-divergence alpha.")] = LossOptions.f_alpha,
    discopop_tau: Annotated[float, loss_option(help="Temperature of the discopop loss.")] = LossOptions.discopop_tau,
    simpo_gamma: Annotated[float, loss_option(help="Target margin of the simpo loss.")] = LossOptions.simpo_gamma,
    sft_weight: Annotated[
        float, loss_option(help="Weight of an SFT loss on the chosen answers beside it (RPO).")
    ] = LossOptions.sft_weight,
    wpo: Annotated[bool, loss_option("--wpo", help="Weight pairs by the policy's own likelihood of them.")] = False,
    ld_alpha: Annotated[
        float | None,
        loss_option(
            help="Weight of tokens beyond the other answer's length (LD-DPO). Needs a cache made with --per-token."
        ),
    ] = None,
    lr: Annotated[float, optimizer_option(help="Peak learning rate.")] = TrainConfig.lr,
    schedule: Annotated[
        str, optimizer_option(help=f"{', '.join(SCHEDULES[:-1])} or {SCHEDULES[-1]}.")
    ] = TrainConfig.schedule,
    min_lr: Annotated[
        float, optimizer_option(help="Share of --lr that cosine and linear end at.")
    ] = TrainConfig.min_lr,
    warmup: Annotated[
        float,
        optimizer_option(help="Steps in which the learning rate rises: below 1 a share of all, else a number."),
    ] = TrainConfig.warmup,
    optimizer: Annotated[
        str, optimizer_option(help="adamw, adamw-8bit or paged-adamw-8bit (bitsandbytes).")
    ] = TrainConfig.optimizer,
    weight_decay: Annotated[float, optimizer_option(help="AdamW's, on matrices only.")] = TrainConfig.weight_decay,
    max_grad_norm: Annotated[
        float, optimizer_option(help="Gradients are clipped to this norm.")
    ] = TrainConfig.max_grad_norm,
    lora_rank: Annotated[
        int, lora_option(help="Train adapters of this rank instead of all weights; 0: none.")
    ] = LoraOptions.lora_rank,
    lora_alpha: Annotated[float | None, lora_option(help="Scale of the adapters. (Default: twice the rank.)")] = None,
    lora_targets: Annotated[
        str, lora_option(help="all-linear, or names of modules: q_proj,v_proj.")
    ] = LoraOptions.lora_targets,
    dtype: Annotated[str, memory_option(help=DTYPE_HELP)] = TrainConfig.dtype,
    layout: Annotated[str, memory_option(help=LAYOUT_HELP)] = TrainConfig.layout,
    parallel: Annotated[str, memory_option(help=PARALLEL_HELP)] = TrainConfig.parallel,
    tokens_per_micro_batch: Annotated[
        int | None, memory_option(help="Token slots at once; accumulation follows. (Default: what fits in memory.)")
    ] = None,
    scratch: Annotated[Path | None, memory_option(help=SCRATCH_HELP)] = None,
    activation_checkpointing: Annotated[
        bool,
        memory_option(
            "--activation-checkpointing", help="Less memory, a third more time: layers are computed again in backward."
        ),
    ] = False,
    compile: Annotated[
        bool,
        memory_option("--compile", help="torch.compile the decoder; the first steps take long."),
    ] = False,
    nproc: Annotated[int, memory_option(min=1, help=NPROC_HELP)] = 1,
    holdout: Annotated[
        float,
        validation_option(
            help="Share of the pairs to validate on instead of training; the best model on them is the one saved."
        ),
    ] = ValidationOptions.holdout,
    eval_cache: Annotated[
        str | None,
        validation_option(metavar="PATH", help="Validate on another reference cache of the same model instead."),
    ] = None,
    eval_every: Annotated[
        int | None,
        validation_option(help="Steps between validations. (Default: ten validations in a run.)"),
    ] = None,
    patience: Annotated[
        int | None,
        validation_option(help="End after so many validations without a lower loss."),
    ] = None,
    min_gain: Annotated[
        float, validation_option(help="How much lower the loss must be, for --patience.")
    ] = ValidationOptions.min_gain,
    max_kl: Annotated[
        float | None,
        validation_option(help="Farthest the policy should move from the reference (kl in the log), nats a token."),
    ] = None,
    on_max_kl: Annotated[str, validation_option(help="Beyond --max-kl: warn or stop.")] = TrainConfig.on_max_kl,
    save_every: Annotated[int, log_option(help="Steps between checkpoints; 0: none.")] = TrainConfig.save_every,
    keep_last: Annotated[int, log_option(help="Checkpoints that stay, beside the best.")] = TrainConfig.keep_last,
    async_save: Annotated[
        bool,
        log_option("--async-save", help="Write checkpoints while training goes on, from a copy in the CPU's memory."),
    ] = False,
    save_dtype: Annotated[
        str,
        log_option(
            help="Of the final model: float32 (as trained), bfloat16, float16, or auto (as it was stored before)."
        ),
    ] = TrainConfig.save_dtype,
    log_every: Annotated[int, log_option(help="Steps between log lines.")] = TrainConfig.log_every,
    tracker: Annotated[
        list[str] | None,
        log_option(help=f"Also tell {', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}; may be given several times."),
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Stage two: train the policy against a reference cache. Model, tokenizer and pairs come from the cache."""
    with errors_as_one_line("train --resume goes on from the newest checkpoint, if there is one"):
        given = given_by_user(ctx)
        before = run_facts(out) if resume else {}
        if resume and not ref_cache and not before:
            raise OutputError(
                f"{out}: no run to go on with (it has no run.json); check --out, or begin with --ref-cache"
            )
        if not ref_cache and not before:
            raise typer.BadParameter("missing; name the directory precompute-ref wrote", param_hint="--ref-cache")
        if ref_cache and len(ref_cache) == 1:
            given["ref_cache"] = ref_cache[0]
        config = fill(TrainConfig, {**before, **preset(recipe), **given})
        run_stage("train", config, nproc, show_train)
