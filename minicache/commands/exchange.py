"""`minidpo export` and `minidpo import-cache`: policies and caches in the form that other programs read, and caches back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from minicache.commands.running import Trust, err, errors_as_one_line, out, run_stage
from minicache.errors import ConfigError
from minicache.options.dictionaries import fill
from minicache.options.exchange import ExportCacheConfig, ExportConfig, ImportConfig
from minicache.screen.live import Screen
from minicache.screen.results import show_export, sources_table
from minicache.text import visible

if TYPE_CHECKING:
    from minicache.stages.export_cache import ExportCacheReport
    from minicache.stages.import_cache import ImportReport


def export(
    to: Annotated[
        Path,
        typer.Option(
            "--out",
            help="Of a policy: a directory to make, or a .pth file (of a MiniMind model). Of a cache: a .parquet, .jsonl, "
            ".jsonl.gz or .jsonl.zst file, or a directory for datasets.load_from_disk.",
        ),
    ],
    policy: Annotated[
        str | None, typer.Option(help="A run directory, one of its checkpoints, a model directory, hub id or file.")
    ] = None,
    ref_cache: Annotated[
        str | None, typer.Option(metavar="PATH", help="Write a reference cache instead, as a table.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of a policy: auto (as it is stored; a .pth in float16), float32, float16 or bfloat16. (Default: auto.)"
        ),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where a policy's tokenizer is, if not with the model.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write a policy as a Hugging Face directory, adapters merged, or as a MiniMind .pth; or a reference cache as a table."""
    with errors_as_one_line():
        if (policy is None) == (ref_cache is None):
            got = "none of them" if policy is None else "both"
            raise ConfigError(f"export: expected --policy POLICY or --ref-cache CACHE, got {got}")
        if policy is not None:
            config = ExportConfig(policy, to, dtype or ExportConfig.dtype, tokenizer, trust_remote_code)
            run_stage("export", config, 1, show_export)
            return
        assert ref_cache is not None
        if dtype or tokenizer or trust_remote_code:
            raise ConfigError("--dtype, --tokenizer, --trust-remote-code: go with --policy; a cache has its own")
        _export_cache(ExportCacheConfig(ref_cache, to))


def _export_cache(config: ExportCacheConfig) -> None:
    from minicache.stages.export_cache import export_cache

    with Screen(err) as tracker:
        report = export_cache(config, tracker)
    show_export_cache(report)


def import_cache(
    file: Annotated[str, typer.Argument(help="What export wrote; or another program's parquet, jsonl or JSON file.")],
    ref_cache: Annotated[str, typer.Option("--ref-cache", metavar="PATH", help="The reference cache to make.")],
    model: Annotated[
        str | None, typer.Option(help="Whose logprobs they are. Needed, but for an export whose --identity is given.")
    ] = None,
    identity: Annotated[
        str | None, typer.Option(help="Of an export: the digest its identity must have, as export printed it.")
    ] = None,
    logps: Annotated[
        str | None, typer.Option(help="Another program's logprobs: the 'sum' over an answer, or the 'mean' a token.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="The precision they were computed in: bfloat16, float16 or float32.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="As of precompute-ref.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="As of precompute-ref.")] = None,
    format: Annotated[str | None, typer.Option(help="As of precompute-ref.")] = None,
    max_length: Annotated[int | None, typer.Option(help="As of precompute-ref.")] = None,
    truncate: Annotated[str | None, typer.Option(help="As of precompute-ref.")] = None,
    loss_on: Annotated[str | None, typer.Option(help="As of precompute-ref.")] = None,
    think: Annotated[str | None, typer.Option(help="As of precompute-ref.")] = None,
    special_text: Annotated[str | None, typer.Option(help="As of precompute-ref.")] = None,
    block_pairs: Annotated[int | None, typer.Option(help="As of precompute-ref.")] = None,
    on_bad_row: Annotated[str | None, typer.Option(help="As of precompute-ref.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Make a reference cache of an export, or of preference rows that carry the reference's logprobs (TRL, open-instruct)."""
    given = locals()
    from minicache.stages.import_cache import import_cache as stage

    with errors_as_one_line():
        config = fill(ImportConfig, given)
        with Screen(err) as tracker:
            report = stage(config, tracker)
        show_import(report, model)


def show_export_cache(report: "ExportCacheReport") -> None:
    out.print(
        f"[bold green]✓[/] {report.pairs:,} pairs in [bold]{escape(visible(str(report.out)))}[/], identity {report.identity}",
        highlight=False,
        soft_wrap=True,
    )
    if report.odd:
        out.print(
            f"  {report.odd:,} pairs count other tokens than just the whole of their answers: a program without loss masks, "
            "as TRL, would compare other sums",
            style="yellow",
        )


def show_import(report: "ImportReport", model: str | None) -> None:
    out.print(sources_table(report.sources))
    cache = escape(visible(str(report.ref_cache)))
    out.print(
        f"[bold green]✓[/] {report.pairs:,} pairs, {report.blocks:,} blocks in [bold]{cache}[/], identity {report.identity}",
        highlight=False,
        soft_wrap=True,
    )
    check = f"minidpo inspect-cache {cache} --verify --model {escape(visible(model or 'MODEL'))}"
    out.print(f"  to score some of them again: {check}", highlight=False, soft_wrap=True)
