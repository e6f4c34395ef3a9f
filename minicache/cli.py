"""The command line: options -> config -> stage -> report. Heavy modules are imported by the command that needs them."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from minicache import __version__, screen
from minicache.config import CompareConfig, EvaluateConfig, InspectConfig, PrecomputeConfig
from minicache.config_train import (
    RECIPES,
    SCHEDULES,
    TRACKERS,
    LoraOptions,
    LossOptions,
    TrainConfig,
    ValidationOptions,
    fill,
)
from minicache.config_train import recipe as preset
from minicache.errors import MinicacheError
from minicache.runs import run_facts
from minicache.signals import Interruptible
from minicache.trackers import Silent

app = typer.Typer(
    help="Offline DPO in two stages: run the frozen reference once, then train the policy alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)  # reports; progress and errors

RefCache = Annotated[Path, typer.Option("--ref-cache", help="The reference cache, a directory.")]
NPROC_HELP = "Processes on this machine, as torchrun would start them."
Nproc = Annotated[int, typer.Option(min=1, help=NPROC_HELP)]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Recipe = Annotated[
    str | None,
    typer.Option(help=f"The defaults of MiniMind's own scripts: {', '.join(RECIPES)}. Other options win over it."),
]
LOSS_HELP = "Preference loss (docs/training.md lists them), or several: sigmoid:0.8,hinge:0.2."
LOGPS_HELP = "Compare 'mean' logprobs a token (MiniMind) or 'sum'med ones (DPO paper, TRL)."
BETA_HELP = "Strength of the pull towards the reference."
DTYPE_HELP = "auto (bfloat16 on CUDA, else float32), bfloat16, float16 or float32."


@app.command("precompute-ref")
def precompute_ref(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="The SFT model: directory, hub id, .gguf or MiniMind .pth.")],
    data: Annotated[list[str], typer.Option(help="Preference files: jsonl, json, parquet; plain, gzip or zstd.")],
    ref_cache: RefCache,
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the model.")] = None,
    recipe: Recipe = None,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja template to use for the tokenizer's own.")] = None,
    format: Annotated[
        str, typer.Option(help="auto, messages, prompt, stack-exchange, sharegpt or hh.")
    ] = PrecomputeConfig.format,
    max_length: Annotated[int, typer.Option(help="Tokens a side may have.")] = PrecomputeConfig.max_length,
    truncate: Annotated[
        str, typer.Option(help="What a longer side loses: 'right' its end, 'left' the prompt's beginning; or 'refuse'.")
    ] = PrecomputeConfig.truncate,
    loss_on: Annotated[
        str, typer.Option(help="Tokens that count: 'response', or every 'assistant' turn.")
    ] = PrecomputeConfig.loss_on,
    think: Annotated[
        str, typer.Option(help="An empty think block that the template writes: 'keep' it or 'drop' it.")
    ] = PrecomputeConfig.think,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = PrecomputeConfig.dtype,
    block_pairs: Annotated[
        int | None, typer.Option(help="Pairs in a block, the unit of resuming. (Default: by model size.)")
    ] = None,
    tokens_per_batch: Annotated[
        int, typer.Option(help="Token slots of one forward pass.")
    ] = PrecomputeConfig.tokens_per_batch,
    per_token: Annotated[bool, typer.Option("--per-token", help="Also store each counted token's logprob.")] = False,
    on_bad_row: Annotated[str, typer.Option(help="'skip' and list it, or 'fail'.")] = PrecomputeConfig.on_bad_row,
    nproc: Nproc = 1,
    trust_remote_code: Trust = False,
) -> None:
    """Stage one: run the frozen reference over all pairs, once. Repeat the command to resume, or with more data to append."""
    with _errors_as_one_line():
        config = fill(PrecomputeConfig, {**preset(recipe), **_given(ctx)})
        _run("precompute", config, nproc, screen.show_precompute)


@app.command()
def train(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="The run directory to make, or to go on with.")],
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
    epochs: Annotated[float, typer.Option(help="Times over the data.")] = TrainConfig.epochs,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, whatever --epochs says.")] = None,
    batch_size: Annotated[
        int, typer.Option(help="Pairs an optimizer step, over all processes.")
    ] = TrainConfig.batch_size,
    seed: Annotated[int, typer.Option(help="Of the order of pairs.")] = TrainConfig.seed,
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
        float, typer.Option(help="Of the alpha divergence.", rich_help_panel="Loss")
    ] = LossOptions.f_alpha,
    discopop_tau: Annotated[
        float, typer.Option(help="Of the discopop loss.", rich_help_panel="Loss")
    ] = LossOptions.discopop_tau,
    simpo_gamma: Annotated[
        float, typer.Option(help="Target margin of the simpo loss.", rich_help_panel="Loss")
    ] = LossOptions.simpo_gamma,
    sft_weight: Annotated[
        float, typer.Option(help="Weight of the chosen answers' likelihood beside it (RPO).", rich_help_panel="Loss")
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
        float, typer.Option(help="AdamW's, on matrices.", rich_help_panel="Optimizer")
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
        bool, typer.Option("--compile", help="torch.compile the decoder.", rich_help_panel="Memory and speed")
    ] = False,
    nproc: Annotated[int, typer.Option(min=1, help=NPROC_HELP, rich_help_panel="Memory and speed")] = 1,
    holdout: Annotated[
        float,
        typer.Option(help="Share of the pairs to validate on, chosen by their digests.", rich_help_panel="Validation"),
    ] = ValidationOptions.holdout,
    eval_cache: Annotated[
        Path | None, typer.Option(help="Validate on this reference cache instead.", rich_help_panel="Validation")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between. (Default: ten in a run.)", rich_help_panel="Validation")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="End after so many without a lower validation loss.", rich_help_panel="Validation"),
    ] = None,
    min_gain: Annotated[
        float, typer.Option(help="How much lower, for --patience.", rich_help_panel="Validation")
    ] = ValidationOptions.min_gain,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Farthest the policy should move, nats a token.", rich_help_panel="Validation"),
    ] = None,
    on_max_kl: Annotated[
        str, typer.Option(help="Beyond that: warn or stop.", rich_help_panel="Validation")
    ] = TrainConfig.on_max_kl,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: none.", rich_help_panel="Checkpoints and logs")
    ] = TrainConfig.save_every,
    keep_last: Annotated[
        int, typer.Option(help="Checkpoints that stay, beside the best.", rich_help_panel="Checkpoints and logs")
    ] = TrainConfig.keep_last,
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
    with _errors_as_one_line():
        given = _given(ctx)
        before = run_facts(out) if resume else {}
        if not ref_cache and not before:
            raise typer.BadParameter("missing", param_hint="--ref-cache")
        config = fill(TrainConfig, {**preset(recipe), **before, **given})
        _run("train", config, nproc, screen.show_train)


@app.command()
def evaluate(
    policy: Annotated[str, typer.Option(help="A run directory, model directory, hub id or file.")],
    ref_cache: RefCache,
    loss: Annotated[str | None, typer.Option(help="(Default: the run's.)")] = None,
    logps: Annotated[str | None, typer.Option(help="mean or sum. (Default: the run's.)")] = None,
    beta: Annotated[float | None, typer.Option(help="(Default: the run's.)")] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = EvaluateConfig.dtype,
    tokens_per_batch: Annotated[
        int, typer.Option(help="Token slots of one forward pass.")
    ] = EvaluateConfig.tokens_per_batch,
    nproc: Nproc = 1,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Preference accuracy, margin, KL estimate and loss of a policy on a (held-out) reference cache."""
    given = locals()
    with _errors_as_one_line():
        config = fill(EvaluateConfig, given)
        _run("evaluate", config, nproc, _print_json if as_json else screen.show_evaluate)


@app.command()
def compare(
    policy: Annotated[str, typer.Option(help="A run directory or model directory.")],
    reference: Annotated[str | None, typer.Option(help="(Default: what the run started from.)")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = CompareConfig.max_new_tokens,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Reference and policy answer the same prompts, side by side."""
    given = locals()
    with _errors_as_one_line():
        config = fill(CompareConfig, given)
        _run("compare", config, 1, _print_json if as_json else screen.show_answers)


@app.command("inspect-cache")
def inspect_cache(
    ref_cache: Annotated[Path, typer.Argument(help="The reference cache, a directory.")],
    pair: Annotated[int | None, typer.Option(help="Show this pair, decoded; from 0.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Re-read everything and check every digest.")] = False,
    model: Annotated[str | None, typer.Option(help="With --verify: also re-score a sample with this model.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """What is in a reference cache: manifest, completeness, lengths, logprobs, extremes. Needs no torch."""
    from minicache import screen_inspect
    from minicache.stages import inspect as stage

    given = locals()
    with _errors_as_one_line():
        config = fill(InspectConfig, given)
        if verify:
            _verify(config, as_json)
        elif pair is not None:
            view = stage.inspect_pair(config)
            _print_json(out, view) if as_json else screen_inspect.show_pair(out, view)
        else:
            inspection = stage.inspect_cache(config)
            _print_json(out, inspection) if as_json else screen_inspect.show_inspection(out, inspection)


def _verify(config: InspectConfig, as_json: bool) -> None:
    from minicache import screen_inspect
    from minicache.stages import inspect as stage

    problems = stage.verify_cache(config)
    if not as_json:
        screen_inspect.show_problems(out, str(config.ref_cache), problems)
    worst = None
    if config.model and not problems:
        worst = _run("verify", config, 1, None if as_json else screen.show_verify)
    if as_json:
        _print_json(out, {"problems": problems, "rescored_difference": worst})
    if problems:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


def _given(ctx: typer.Context) -> dict[str, Any]:
    """What the user wrote on the command line, without any default."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name: ctx.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _run(name: str, config: Any, nproc: int, show: Callable[[Console, Any], object] | None) -> Any:
    """Run the stage `name`, a function in a module of that name, in as many processes as asked, and show its report."""
    if nproc > 1 and "WORLD_SIZE" not in os.environ:
        from minicache.launch import launch

        raise typer.Exit(launch(nproc, sys.argv[1:]))
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' own bars; ours are the ones to watch
    screen_ = screen.Screen(err)
    screen_.begin("starting", None)
    from minicache.distributed import join_world, leave_world

    stage = getattr(import_module(f"minicache.stages.{name}"), name)
    world = join_world()
    with screen_ if world.is_main else Silent() as tracker:
        report = stage(config, world, tracker)
    if world.is_main and show:
        show(out, report)
    leave_world()
    return report


@contextmanager
def _errors_as_one_line() -> Iterator[None]:
    """A user's error is one red line and exit code 1, an interruption 130; anything else is a bug and shows its traceback."""
    try:
        with Interruptible():
            yield
    except MinicacheError as error:
        if int(os.environ.get("RANK", 0)):
            time.sleep(3)  # what every rank runs into, rank 0 tells: by now the launcher has ended this one
        screen.show_error(err, str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interruption:
        told = str(interruption) or "stage one goes on from its last finished block when run again"
        err.print(f"interrupted; {told}", style="yellow")
        raise typer.Exit(130) from None


def _print_json(console: Console, report: Any) -> None:
    def plain(value: Any) -> Any:
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)

    console.out(json.dumps(report, indent=2, ensure_ascii=False, default=plain), highlight=False)


def expand_data(arguments: list[str]) -> list[str]:
    """`--data a b c`, which click does not know, as `--data a --data b --data c`."""
    expanded: list[str] = []
    in_data = fresh = False
    for argument in arguments:
        if argument.startswith("-"):
            in_data, fresh = argument == "--data", True
        elif in_data and not fresh:
            expanded.append("--data")
        elif in_data:
            fresh = False
        expanded.append(argument)
    return expanded


def main() -> None:
    sys.argv[1:] = expand_data(sys.argv[1:])
    app(prog_name="minidpo")
