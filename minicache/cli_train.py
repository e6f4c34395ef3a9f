"""`minidpo train`: its options."""

from pathlib import Path
from typing import Annotated

import typer

from minicache import screen
from minicache.command import (
    DTYPE_HELP,
    LAYOUT_HELP,
    NPROC_HELP,
    Recipe,
    Trust,
    errors_as_one_line,
    given_by_user,
    run_stage,
)
from minicache.config_train import (
    SCHEDULES,
    TRACKERS,
    LoraOptions,
    LossOptions,
    TrainConfig,
    ValidationOptions,
    fill,
)
from minicache.config_train import recipe as preset
from minicache.errors import OutputError
from minicache.runs import run_facts

LOSS_HELP = "Preference loss (docs/training.md lists them), or several: sigmoid:0.8,hinge:0.2."
LOGPS_HELP = "Compare logprobs as 'mean' a token (MiniMind till 2510) or as 'sum' (DPO paper, TRL, MiniMind 3)."
BETA_HELP = "The higher, the closer the policy stays to the reference. Suits one --logps, not both."


def train(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="The run directory to make, or with --resume to go on with.")],
    ref_cache: Annotated[
        Path | None, typer.Option(help="The reference cache. Needed unless --resume knows it from the run.")
    ] = None,
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
    loss: Annotated[str, typer.Option(help=LOSS_HELP, rich_help_panel="Loss")] = TrainConfig.loss,
    logps: Annotated[str, typer.Option(help=LOGPS_HELP, rich_help_panel="Loss")] = TrainConfig.logps,
    beta: Annotated[float, typer.Option(help=BETA_HELP, rich_help_panel="Loss")] = TrainConfig.beta,
    beta_end: Annotated[
        float | None, typer.Option(help="Beta at the last step; it changes linearly.", rich_help_panel="Loss")
    ] = None,
    label_smoothing: Annotated[
        float, typer.Option(help="Share of labels taken to be flipped.", rich_help_panel="Loss")
    ] = LossOptions.label_smoothing,
    f_divergence: Annotated[
        str, typer.Option(help="reverse_kl, forward_kl, js or alpha.", rich_help_panel="Loss")
    ] = LossOptions.f_divergence,
    f_alpha: Annotated[
        float, typer.Option(help="Its alpha, for --f-divergence alpha.", rich_help_panel="Loss")
    ] = LossOptions.f_alpha,
    discopop_tau: Annotated[
        float, typer.Option(help="Temperature of the discopop loss.", rich_help_panel="Loss")
    ] = LossOptions.discopop_tau,
    simpo_gamma: Annotated[
        float, typer.Option(help="Target margin of the simpo loss.", rich_help_panel="Loss")
    ] = LossOptions.simpo_gamma,
    sft_weight: Annotated[
        float, typer.Option(help="Weight of an SFT loss on the chosen answers beside it (RPO).", rich_help_panel="Loss")
    ] = LossOptions.sft_weight,
    wpo: Annotated[
        bool, typer.Option("--wpo", help="Weight pairs by the policy's own likelihood of them.", rich_help_panel="Loss")
    ] = False,
    ld_alpha: Annotated[
        float | None,
        typer.Option(
            help="Weight of tokens beyond the other answer's length (LD-DPO). Needs a cache made with --per-token.",
            rich_help_panel="Loss",
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel="Optimizer")] = TrainConfig.lr,
    schedule: Annotated[
        str, typer.Option(help=f"{', '.join(SCHEDULES[:-1])} or {SCHEDULES[-1]}.", rich_help_panel="Optimizer")
    ] = TrainConfig.schedule,
    min_lr: Annotated[
        float, typer.Option(help="Share of --lr that cosine and linear end at.", rich_help_panel="Optimizer")
    ] = TrainConfig.min_lr,
    warmup: Annotated[
        float,
        typer.Option(
            help="Steps in which the learning rate rises: below 1 a share of all, else a number.",
            rich_help_panel="Optimizer",
        ),
    ] = TrainConfig.warmup,
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw-8bit or paged-adamw-8bit (bitsandbytes).", rich_help_panel="Optimizer")
    ] = TrainConfig.optimizer,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's, on matrices only.", rich_help_panel="Optimizer")
    ] = TrainConfig.weight_decay,
    max_grad_norm: Annotated[
        float, typer.Option(help="Gradients are clipped to this norm.", rich_help_panel="Optimizer")
    ] = TrainConfig.max_grad_norm,
    lora_rank: Annotated[
        int, typer.Option(help="Train adapters of this rank instead of all weights; 0: none.", rich_help_panel="LoRA")
    ] = LoraOptions.lora_rank,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Scale of the adapters. (Default: twice the rank.)", rich_help_panel="LoRA")
    ] = None,
    lora_targets: Annotated[
        str, typer.Option(help="all-linear, or names of modules: q_proj,v_proj.", rich_help_panel="LoRA")
    ] = LoraOptions.lora_targets,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP, rich_help_panel="Memory and speed")] = TrainConfig.dtype,
    layout: Annotated[str, typer.Option(help=LAYOUT_HELP, rich_help_panel="Memory and speed")] = TrainConfig.layout,
    tokens_per_micro_batch: Annotated[
        int,
        typer.Option(
            help="Token slots that fit in memory at once; accumulation follows.", rich_help_panel="Memory and speed"
        ),
    ] = TrainConfig.tokens_per_micro_batch,
    activation_checkpointing: Annotated[
        bool,
        typer.Option(
            "--activation-checkpointing",
            help="Less memory, a third more time: layers are computed again in backward.",
            rich_help_panel="Memory and speed",
        ),
    ] = False,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="torch.compile the decoder; the first steps take long.",
            rich_help_panel="Memory and speed",
        ),
    ] = False,
    nproc: Annotated[int, typer.Option(min=1, help=NPROC_HELP, rich_help_panel="Memory and speed")] = 1,
    holdout: Annotated[
        float,
        typer.Option(
            help="Share of the pairs to validate on instead of training; the best model on them is the one saved.",
            rich_help_panel="Validation",
        ),
    ] = ValidationOptions.holdout,
    eval_cache: Annotated[
        Path | None,
        typer.Option(
            help="Validate on another reference cache of the same model instead.", rich_help_panel="Validation"
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between validations. (Default: ten validations in a run.)", rich_help_panel="Validation"
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="End after so many validations without a lower loss.", rich_help_panel="Validation"),
    ] = None,
    min_gain: Annotated[
        float, typer.Option(help="How much lower the loss must be, for --patience.", rich_help_panel="Validation")
    ] = ValidationOptions.min_gain,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Farthest the policy should move from the reference (kl in the log), nats a token.",
            rich_help_panel="Validation",
        ),
    ] = None,
    on_max_kl: Annotated[
        str, typer.Option(help="Beyond --max-kl: warn or stop.", rich_help_panel="Validation")
    ] = TrainConfig.on_max_kl,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: none.", rich_help_panel="Checkpoints and logs")
    ] = TrainConfig.save_every,
    keep_last: Annotated[
        int, typer.Option(help="Checkpoints that stay, beside the best.", rich_help_panel="Checkpoints and logs")
    ] = TrainConfig.keep_last,
    save_dtype: Annotated[
        str,
        typer.Option(
            help="Of the final model: float32 (as trained), bfloat16, float16, or auto (as it was stored before).",
            rich_help_panel="Checkpoints and logs",
        ),
    ] = TrainConfig.save_dtype,
    log_every: Annotated[
        int, typer.Option(help="Steps between log lines.", rich_help_panel="Checkpoints and logs")
    ] = TrainConfig.log_every,
    tracker: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Also tell {', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}; may be given several times.",
            rich_help_panel="Checkpoints and logs",
        ),
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
        config = fill(TrainConfig, {**before, **preset(recipe), **given})
        run_stage("train", config, nproc, screen.show_train)
