"""The command line: options -> config -> stage -> report. Heavy modules are imported by the command that needs them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from minicache import __version__
from minicache.commands.diff import diff
from minicache.commands.exchange import export, import_cache
from minicache.commands.report import report
from minicache.commands.running import (
    DTYPE_HELP,
    LAYOUT_HELP,
    PARALLEL_HELP,
    SCRATCH_HELP,
    Json,
    Nproc,
    Recipe,
    RefCache,
    TokensPerBatch,
    Trust,
    err,
    errors_as_one_line,
    given_by_user,
    out,
    print_json,
    run_stage,
)
from minicache.commands.sweep import sweep
from minicache.commands.train import train
from minicache.options.dictionaries import fill
from minicache.options.others import CompareConfig, EvaluateConfig, InspectConfig, MergeConfig, PlotConfig
from minicache.options.recipes import recipe as preset
from minicache.options.stage_one import PrecomputeConfig
from minicache.processes.signals import CommandLine
from minicache.screen.live import Screen
from minicache.screen.results import show_answers, show_evaluate, show_file, show_merge, show_precompute, show_verify

app = typer.Typer(
    help="Offline DPO in two stages: run the frozen reference once, then train the policy alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("precompute-ref")
def precompute_ref(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="The SFT model: directory, hub id, .gguf or MiniMind .pth.")],
    data: Annotated[list[str], typer.Option(help="Preference files: jsonl, json, parquet; plain, gzip or zstd.")],
    ref_cache: RefCache,
    tokenizer: Annotated[
        str | None, typer.Option(help="Where the tokenizer is, if not with the model (a .pth has none).")
    ] = None,
    recipe: Recipe = None,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja template to use for the tokenizer's own.")] = None,
    format: Annotated[
        str, typer.Option(help="auto, messages, prompt, stack-exchange, sharegpt or hh.")
    ] = PrecomputeConfig.format,
    max_length: Annotated[
        int, typer.Option(help="Tokens of prompt and answer together.")
    ] = PrecomputeConfig.max_length,
    truncate: Annotated[
        str, typer.Option(help="What a longer side loses: 'right' its end, 'left' the prompt's beginning; or 'refuse'.")
    ] = PrecomputeConfig.truncate,
    loss_on: Annotated[
        str, typer.Option(help="Tokens that count: 'response', or every 'assistant' turn.")
    ] = PrecomputeConfig.loss_on,
    think: Annotated[
        str, typer.Option(help="An empty think block that the template writes: 'keep' it or 'drop' it.")
    ] = PrecomputeConfig.think,
    special_text: Annotated[
        str,
        typer.Option(help="<|im_end|> and its like, typed in a content: 'plain' text, 'refuse' the row, or 'allow'."),
    ] = PrecomputeConfig.special_text,
    dtype: Annotated[str, typer.Option("--dtype", "--ref-dtype", help=DTYPE_HELP)] = PrecomputeConfig.dtype,
    block_pairs: Annotated[
        int | None, typer.Option(help="Pairs in a block, the unit of resuming. (Default: by model size.)")
    ] = None,
    layout: Annotated[str, typer.Option(help=LAYOUT_HELP)] = PrecomputeConfig.layout,
    parallel: Annotated[str, typer.Option(help=PARALLEL_HELP)] = PrecomputeConfig.parallel,
    tokens_per_batch: TokensPerBatch = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="Also store each counted token's logprob.")] = False,
    on_bad_row: Annotated[str, typer.Option(help="'skip' and list it, or 'fail'.")] = PrecomputeConfig.on_bad_row,
    shard: Annotated[
        str | None, typer.Option(metavar="K/N", help="Be job K of N that share one cache, each scoring its own blocks.")
    ] = None,
    nproc: Nproc = 1,
    trust_remote_code: Trust = False,
) -> None:
    """Stage one: run the frozen reference over all pairs, once. Repeat the command to resume, or with more data to append."""
    with errors_as_one_line("stage one goes on from its last finished block when run again"):
        config = fill(PrecomputeConfig, {**preset(recipe), **given_by_user(ctx)})
        run_stage("precompute", config, nproc, show_precompute)


app.command()(train)
app.command()(sweep)
app.command()(report)


@app.command()
def evaluate(
    policy: Annotated[str, typer.Option(help="A run directory, model directory, hub id or file.")],
    ref_cache: RefCache,
    loss: Annotated[str | None, typer.Option(help="As of train. (Default: the run's.)")] = None,
    logps: Annotated[str | None, typer.Option(help="mean or sum. (Default: the run's.)")] = None,
    beta: Annotated[float | None, typer.Option(help="As of train. (Default: the run's.)")] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = EvaluateConfig.dtype,
    tokens_per_batch: TokensPerBatch = None,
    scratch: Annotated[Path | None, typer.Option(help=SCRATCH_HELP)] = None,
    nproc: Nproc = 1,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Preference accuracy, margin, KL estimate and loss of a policy on a (held-out) reference cache."""
    given = locals()
    with errors_as_one_line():
        config = fill(EvaluateConfig, given)
        run_stage("evaluate", config, nproc, print_json if as_json else show_evaluate)


@app.command()
def compare(
    policy: Annotated[str, typer.Option(help="A run directory, one of its checkpoints, or a model directory.")],
    reference: Annotated[
        str | None, typer.Option(help="The model to compare with. (Default: what the run started from.)")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file: one prompt a line, or jsonl, json or parquet rows of prompts or messages."),
    ] = None,
    ref_cache: Annotated[
        str | None, typer.Option(metavar="PATH", help="Take prompts from the pairs of this cache.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="How many of them, evenly spread. (Default: 16.)")] = None,
    system: Annotated[str | None, typer.Option(help="System turn of conversations that have none.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = CompareConfig.max_new_tokens,
    temperature: Annotated[
        float, typer.Option(help="0: the likeliest token each time; above, sampled.")
    ] = CompareConfig.temperature,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this share.")] = CompareConfig.top_p,
    seed: Annotated[
        int, typer.Option(help="Seed of sampling, and of which answer is A on the page.")
    ] = CompareConfig.seed,
    batch_size: Annotated[int, typer.Option(help="Prompts answered at once.")] = CompareConfig.batch_size,
    jsonl: Annotated[Path | None, typer.Option(help="Write one object a prompt here, over what is there.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page for blind votes here, over what is there.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Reference and policy answer the same prompts, side by side: on the screen, as JSON lines, as a page to vote on."""
    given = locals()
    with errors_as_one_line():
        config = fill(CompareConfig, given)
        run_stage("compare", config, 1, print_json if as_json else show_answers)
        for file in filter(None, () if as_json else (jsonl, html)):
            show_file(out, file)


app.command()(export)
app.command("import-cache")(import_cache)


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

    with errors_as_one_line():
        show_file(out, draw(PlotConfig(tuple(runs), out_file, smooth)))


@app.command()
def merge(
    caches: Annotated[
        list[str],
        typer.Argument(metavar="CACHES...", help="Complete reference caches of one model, tokenizer and options."),
    ],
    ref_cache: Annotated[
        str, typer.Option("--ref-cache", metavar="PATH", help="The reference cache to make, a directory or a URL.")
    ],
) -> None:
    """Make one reference cache of several; a pair that more than one holds is kept once. Needs no torch."""
    from minicache.stages import merge as stage

    with errors_as_one_line():
        config = MergeConfig(tuple(caches), ref_cache)
        with Screen(err) as tracker:
            report = stage.merge(config, tracker)
        show_merge(out, report)


@app.command("inspect-cache")
def inspect_cache(
    ref_cache: Annotated[str, typer.Argument(help="The reference cache, a directory or a URL.")],
    pair: Annotated[int | None, typer.Option(help="Show this pair, decoded; from 0.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Re-read everything and check every digest.")] = False,
    model: Annotated[str | None, typer.Option(help="With --verify: also re-score a sample with this model.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the histograms here: png, svg or pdf.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write all this as a page here, over what is there.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """What is in a reference cache: manifest, completeness, lengths, logprobs, extremes. Needs no torch."""
    from minicache.pictures.cache import draw_inspection
    from minicache.pictures.frame import check_picture
    from minicache.screen import inspect as screen_inspect
    from minicache.stages import inspect as stage

    given = locals()
    with errors_as_one_line():
        config = fill(InspectConfig, given)
        if config.plot:
            check_picture(config.plot)
        if verify:
            _verify(config, as_json)
        elif pair is not None:
            view = stage.inspect_pair(config)
            print_json(out, view) if as_json else screen_inspect.show_pair(out, view)
        else:
            inspection = stage.inspect_cache(config)
            print_json(out, inspection) if as_json else screen_inspect.show_inspection(out, inspection)
            if config.plot:
                draw_inspection(inspection, config.plot)
                show_file(err if as_json else out, config.plot)
            if config.html:
                _write_page(config, as_json)


def _write_page(config: InspectConfig, as_json: bool) -> None:
    from minicache.stages.inspect import write_cache_page

    with Screen(err) as tracker:
        file = write_cache_page(config, tracker)
    show_file(err if as_json else out, file)


def _verify(config: InspectConfig, as_json: bool) -> None:
    from minicache.screen import inspect as screen_inspect
    from minicache.stages import inspect as stage

    problems = stage.verify_cache(config)
    if not as_json:
        screen_inspect.show_problems(out, str(config.ref_cache), problems)
    worst = None
    if config.model and not problems:
        worst = run_stage("inspect.verify_model", config, 1, None if as_json else show_verify)
    if as_json:
        print_json(out, {"problems": problems, "rescored_difference": worst})
    if problems:
        raise typer.Exit(1)


app.command()(diff)


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


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
    with CommandLine():
        sys.argv[1:] = expand_data(sys.argv[1:])
        app(prog_name="minidpo")
