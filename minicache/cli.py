"""The command line: options -> config -> stage -> report. Heavy modules are imported by the command that needs them."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from minicache import __version__, screen
from minicache.config import (
    CompareConfig,
    EvaluateConfig,
    InspectConfig,
    LossOptions,
    PlotConfig,
    PrecomputeConfig,
    TrainConfig,
)
from minicache.errors import MinicacheError
from minicache.trackers import Silent

Config = TypeVar("Config")

app = typer.Typer(
    help="Offline DPO in two stages: run the frozen reference once, then train the policy alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)  # reports; progress and errors

RefCache = Annotated[Path, typer.Option("--ref-cache", help="The reference cache, a directory.")]
Nproc = Annotated[int, typer.Option(min=1, help="Processes on this machine, as torchrun would start them.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Logps = Annotated[
    str, typer.Option(help="Compare 'mean' logprobs a token (MiniMind) or 'sum'med ones (DPO paper, TRL).")
]
Beta = Annotated[float, typer.Option(help="Strength of the pull towards the reference.")]
Loss = Annotated[
    str, typer.Option(help="Preference loss (docs/training.md lists them), or several: sigmoid:0.8,hinge:0.2.")
]
TrainDtype = Annotated[str, typer.Option(help="auto (bfloat16 on CUDA, else float32), bfloat16 or float32.")]


@app.command("precompute-ref")
def precompute_ref(
    model: Annotated[str, typer.Option(help="The SFT model: directory, hub id, .gguf or MiniMind .pth.")],
    data: Annotated[list[str], typer.Option(help="Preference files: jsonl, json, parquet; plain, gzip or zstd.")],
    ref_cache: RefCache,
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the model.")] = None,
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
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 on CUDA, else float32), bfloat16, float16 or float32.")
    ] = PrecomputeConfig.dtype,
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
    given = locals()
    with _errors_as_one_line():
        config = _fill(PrecomputeConfig, given, data=tuple(data))
        _run("precompute", config, nproc, screen.show_precompute)


@app.command()
def train(
    ref_cache: RefCache,
    out: Annotated[Path, typer.Option(help="The run directory to make.")],
    model: Annotated[
        str | None, typer.Option(help="Where the reference's weights are now. (Default: where stage one found them.)")
    ] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Start from other weights than the reference's, on purpose.")
    ] = None,
    loss: Loss = TrainConfig.loss,
    logps: Logps = TrainConfig.logps,
    beta: Beta = TrainConfig.beta,
    beta_end: Annotated[float | None, typer.Option(help="Beta at the last step; it changes linearly.")] = None,
    label_smoothing: Annotated[
        float, typer.Option(help="Share of labels taken to be flipped.")
    ] = LossOptions.label_smoothing,
    f_divergence: Annotated[str, typer.Option(help="reverse_kl, forward_kl, js or alpha.")] = LossOptions.f_divergence,
    f_alpha: Annotated[float, typer.Option(help="Of the alpha divergence.")] = LossOptions.f_alpha,
    discopop_tau: Annotated[float, typer.Option(help="Of the discopop loss.")] = LossOptions.discopop_tau,
    simpo_gamma: Annotated[float, typer.Option(help="Target margin of the simpo loss.")] = LossOptions.simpo_gamma,
    sft_weight: Annotated[
        float, typer.Option(help="Weight of the chosen answers' likelihood beside it (RPO).")
    ] = LossOptions.sft_weight,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = TrainConfig.lr,
    schedule: Annotated[
        str, typer.Option(help="cosine, linear, constant, minimind-2504 or minimind-3.")
    ] = TrainConfig.schedule,
    min_lr: Annotated[float, typer.Option(help="Share of --lr that cosine and linear end at.")] = TrainConfig.min_lr,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, on matrices.")] = TrainConfig.weight_decay,
    warmup: Annotated[
        float, typer.Option(help="Steps in which the learning rate rises: below 1 a share of all, else a number.")
    ] = TrainConfig.warmup,
    epochs: Annotated[float, typer.Option(help="Times over the data.")] = TrainConfig.epochs,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, whatever --epochs says.")] = None,
    batch_size: Annotated[
        int, typer.Option(help="Pairs an optimizer step, over all processes.")
    ] = TrainConfig.batch_size,
    tokens_per_micro_batch: Annotated[
        int, typer.Option(help="Token slots that fit in memory at once; accumulation follows.")
    ] = TrainConfig.tokens_per_micro_batch,
    max_grad_norm: Annotated[
        float, typer.Option(help="Gradients are clipped to this norm.")
    ] = TrainConfig.max_grad_norm,
    seed: Annotated[int, typer.Option(help="Of the order of pairs.")] = TrainConfig.seed,
    dtype: TrainDtype = TrainConfig.dtype,
    log_every: Annotated[int, typer.Option(help="Steps between log lines.")] = TrainConfig.log_every,
    nproc: Nproc = 1,
    trust_remote_code: Trust = False,
) -> None:
    """Stage two: train the policy against a reference cache. Model, tokenizer and pairs come from the cache."""
    given = locals()
    with _errors_as_one_line():
        config = _fill(TrainConfig, given, loss_options=_fill(LossOptions, given))
        _run("train", config, nproc, screen.show_train)


@app.command()
def evaluate(
    policy: Annotated[str, typer.Option(help="A run directory, model directory, hub id or file.")],
    ref_cache: RefCache,
    loss: Annotated[str | None, typer.Option(help="(Default: the run's.)")] = None,
    logps: Annotated[str | None, typer.Option(help="mean or sum. (Default: the run's.)")] = None,
    beta: Annotated[float | None, typer.Option(help="(Default: the run's.)")] = None,
    dtype: TrainDtype = EvaluateConfig.dtype,
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
        config = _fill(EvaluateConfig, given)
        _run("evaluate", config, nproc, _print_json if as_json else screen.show_evaluate)


@app.command()
def compare(
    policy: Annotated[str, typer.Option(help="A run directory or model directory.")],
    reference: Annotated[str | None, typer.Option(help="(Default: what the run started from.)")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file: one prompt a line, or jsonl, json or parquet rows of prompts or messages."),
    ] = None,
    ref_cache: Annotated[Path | None, typer.Option(help="Take prompts from the pairs of this cache.")] = None,
    pairs: Annotated[int | None, typer.Option(help="How many of them, evenly spread. (Default: 16.)")] = None,
    system: Annotated[str | None, typer.Option(help="System turn of conversations that have none.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = CompareConfig.max_new_tokens,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = CompareConfig.temperature,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this share.")] = CompareConfig.top_p,
    seed: Annotated[int, typer.Option(help="Of sampling, and of who is A on the page.")] = CompareConfig.seed,
    batch_size: Annotated[int, typer.Option(help="Prompts answered at once.")] = CompareConfig.batch_size,
    jsonl: Annotated[Path | None, typer.Option(help="Write one object a prompt here, over what is there.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page for blind votes here, over what is there.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Reference and policy answer the same prompts, side by side: on the screen, as JSON lines, as a page to vote on."""
    given = locals()
    with _errors_as_one_line():
        config = _fill(CompareConfig, given, prompt=tuple(prompt or ()))
        _run("compare", config, 1, _print_json if as_json else screen.show_answers)
        for file in filter(None, () if as_json else (jsonl, html)):
            screen.show_file(out, file)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are drawn over each other.")],
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="png, svg or pdf, written over what is there. (Default: curves.png in the run.)"),
    ] = None,
    smooth: Annotated[float, typer.Option(help="0: as logged; nearer to 1: smoother.")] = PlotConfig.smooth,
) -> None:
    """Loss, margins, accuracy, logprobs and more over the steps of one run or several, as a picture. Needs no torch."""
    from minicache.stages.plot import plot as draw

    with _errors_as_one_line():
        screen.show_file(out, draw(PlotConfig(tuple(runs), out_file, smooth)))


@app.command("inspect-cache")
def inspect_cache(
    ref_cache: Annotated[Path, typer.Argument(help="The reference cache, a directory.")],
    pair: Annotated[int | None, typer.Option(help="Show this pair, decoded; from 0.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Re-read everything and check every digest.")] = False,
    model: Annotated[str | None, typer.Option(help="With --verify: also re-score a sample with this model.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the histograms here: png, svg or pdf.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """What is in a reference cache: manifest, completeness, lengths, logprobs, extremes. Needs no torch."""
    from minicache import screen_inspect
    from minicache.plots import check_picture, draw_inspection
    from minicache.stages import inspect as stage

    given = locals()
    with _errors_as_one_line():
        config = _fill(InspectConfig, given)
        if config.plot:
            check_picture(config.plot)
        if verify:
            _verify(config, as_json)
        elif pair is not None:
            view = stage.inspect_pair(config)
            _print_json(out, view) if as_json else screen_inspect.show_pair(out, view)
        else:
            inspection = stage.inspect_cache(config)
            _print_json(out, inspection) if as_json else screen_inspect.show_inspection(out, inspection)
            if config.plot:
                draw_inspection(inspection, config.plot)
                screen.show_file(err if as_json else out, config.plot)


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


def _fill(config: type[Config], given: dict[str, Any], **prepared: Any) -> Config:
    """A config from a command's parameters: each field from the parameter of its name."""
    taken = {item.name: given[item.name] for item in fields(config) if item.name in given}  # type: ignore[arg-type]
    return config(**{**taken, **prepared})


@contextmanager
def _errors_as_one_line() -> Iterator[None]:
    """A user's error is one red line and exit code 1, an interruption 130; anything else is a bug and shows its traceback."""
    try:
        yield
    except MinicacheError as error:
        if int(os.environ.get("RANK", 0)):
            time.sleep(3)  # what every rank runs into, rank 0 tells: by now the launcher has ended this one
        screen.show_error(err, str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        err.print("interrupted; stage one goes on from its last finished block when run again", style="yellow")
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
