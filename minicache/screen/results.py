"""What each command prints at its end: one function a stage. rich only; no torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minicache.options.objective import starts_at_ln_2
from minicache.reports.held_out import HeldOut, figures
from minicache.reports.names import METRICS, moved
from minicache.reports.notes import notes_on, together
from minicache.screen.console import CHECK, UNMOVED
from minicache.screen.live import duration, metrics_table
from minicache.text import ranges

if TYPE_CHECKING:
    from minicache.pages.compare import Answers
    from minicache.stages.evaluate import EvaluateReport
    from minicache.stages.export import ExportReport
    from minicache.stages.export_cache import ExportCacheReport
    from minicache.stages.import_cache import ImportReport
    from minicache.stages.merge import MergeReport
    from minicache.stages.precompute import PrecomputeReport
    from minicache.stages.train import TrainReport


# --- reports, one function a stage ---


def show_error(console: Console, message: str) -> None:
    """Print one red line."""
    console.print(Text(f"error: {' '.join(message.split())}", style="bold red"), soft_wrap=True)


def show_precompute(console: Console, report: "PrecomputeReport") -> None:
    show_sources(console, [asdict(source) for source in report.sources])
    scored = f"{report.scored:,} scored now" if report.scored else "nothing left to score"
    console.print(Text.assemble(CHECK, f" {report.pairs:,} pairs in ", (str(report.ref_cache), "bold"), f", {scored}"))
    if report.shard:
        console.print(Text(_shard_lines(report)), highlight=False)
    if any(source.refused for source in report.sources):
        console.print(Text(f"  refused rows, line by line: {report.refused_file}"))


def _shard_lines(report: "PrecomputeReport") -> str:
    mine = (
        f"blocks {ranges(report.scored_blocks)}"
        if report.scored_blocks
        else "no block: all of its blocks were scored before"
    )
    missing = f"not complete: {len(report.missing):,} of {report.blocks:,} blocks are missing: {ranges(report.missing)}"
    state = missing if report.missing else f"complete: all {report.blocks:,} blocks are scored"
    return f"  shard {report.shard} scored {mine}\n  the cache is {state}"


def show_merge(console: Console, report: "MergeReport") -> None:
    for path, pairs in report.given:
        console.print(Text(f"  {pairs:,} pairs of {path!s}"))
    console.print(
        Text.assemble(
            CHECK,
            f" {report.pairs:,} pairs, {report.blocks:,} blocks in ",
            (str(report.ref_cache), "bold"),
            f"; {report.twice:,} pairs were in more than one cache and are kept once",
        )
    )


def show_sources(console: Console, sources: Sequence[Mapping[str, Any]]) -> None:
    """Print what was read of each file, and what of it is not used."""
    console.print(sources_table(sources))
    show_notes(console, sources)


def show_notes(console: Console, sources: Sequence[Mapping[str, Any]]) -> None:
    """Print what of the files is not used, and the like."""
    for line in notes_on(together(sources)) if sources else ():
        console.print(Text(f"  {line}"), soft_wrap=True)


def sources_table(sources: Iterable[Mapping[str, Any]]) -> Table:
    """What was read of each file: kept, duplicate, truncated, refused by reason."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("file", overflow="fold")
    for heading in ("rows", "kept", "duplicate", "truncated", "refused"):
        table.add_column(heading, justify="right")
    for source in sources:
        refused = ", ".join(f"{count:,} {reason}" for reason, count in sorted(source["refused"].items())) or "0"
        numbers = (f"{source[name]:,}" for name in ("rows", "kept", "duplicates", "truncated"))
        table.add_row(Text(source["name"]), *numbers, Text(refused))
    return table


def show_train(console: Console, report: "TrainReport") -> None:
    progress = report.progress
    first, last = progress.first, progress.last
    console.print(metrics_table([(0, first), (progress.last_step, last)]))
    known = report.noise is not None and report.from_ln_2
    start = f" (step 0 was {abs(first['loss'] - math.log(2)):.1g} from ln 2)" if known else ""
    if report.stopped:
        console.print(Text(f"ended early: {report.stopped}", style="yellow"))
    if progress.validation:
        held = progress.validation
        console.print(
            f"  best validation after {report.model_step:,} steps: loss {held['loss']:.4f}, "
            f"accuracy {held['rewards/accuracy']:.1%}, kl {held[moved(held)]:.3g}",
            highlight=False,
        )
    if progress.held_out:
        _show_held_out(console, progress.held_out)
    _show_words(console, report.words)
    console.print(
        Text.assemble(
            CHECK if report.learned else UNMOVED,
            f" {progress.step:,} steps in {duration(progress.total_seconds)}: loss {first['loss']:.4f} → "
            f"{last['loss']:.4f}{start}; policy in ",
            (str(report.model_dir), "bold"),
        )
    )


def show_evaluate(console: Console, report: "EvaluateReport") -> None:
    metrics = report.metrics
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    asked = report.settings
    table.add_column(
        f"{report.pairs:,} pairs of {report.ref_cache}, {asked['loss']} loss, {asked['logps']}, beta {asked['beta']:g}"
    )
    table.add_column("reference", justify="right")
    table.add_column("policy", justify="right")
    rows = [
        (
            "prefers chosen (its own logprobs)",
            f"{metrics['accuracy/reference']:.1%}",
            f"{metrics['accuracy/policy']:.1%}",
        ),
        ("implicit reward prefers chosen", "–", f"{metrics['rewards/accuracy']:.1%}"),
        ("reward margin", "0", f"{metrics['rewards/margin']:+.4f}"),
        ("loss", f"{math.log(2):.4f}" if starts_at_ln_2(asked) else "–", f"{metrics['loss']:.4f}"),
        *((METRICS[name].name, "0", f"{metrics[name]:.3g}") for name in ("kl_tokens", "kl") if name in metrics),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    _show_held_out(console, report.held_out)
    _show_words(console, report.words)


def _show_held_out(console: Console, found: HeldOut) -> None:
    for name, line in figures(found):
        console.print(f"  {name} {line}", highlight=False, soft_wrap=True)


def _show_words(console: Console, words: Iterable[str]) -> None:
    for line in words:
        console.print(Text(f"  {line}", style="yellow"), soft_wrap=True)


def show_answers(console: Console, answers: Sequence["Answers"]) -> None:
    for number, item in enumerate(answers, start=1):
        prompt = f"{number}/{len(answers)}  {item.prompt}" if len(answers) > 1 else item.prompt
        title = Text(prompt)
        table = Table(
            box=SIMPLE_HEAD, header_style="bold", pad_edge=False, title=title, title_justify="left", expand=True
        )
        table.add_column("reference", ratio=1)
        table.add_column("policy", ratio=1)
        table.add_row(_answer(item.reference, item.reference_cut), _answer(item.policy, item.policy_cut))
        console.print(table)


def _answer(text: str, cut: bool) -> Text:
    """cut: the answer was ended by the longest length allowed."""
    shown = Text(text) if text else Text("(no answer)", style="dim")
    return shown.append(" … (cut)", style="dim") if cut else shown


def show_file(console: Console, file: Path) -> None:
    console.print(Text.assemble(CHECK, " ", (str(file), "bold")), soft_wrap=True)


def show_export(console: Console, report: "ExportReport") -> None:
    size = f"{report.parameters / 1e6:,.1f} million parameters in {report.dtype}"
    mark = CHECK if report.learned else UNMOVED
    console.print(Text.assemble(mark, f" {size}; load it as ", (report.name, "bold")), soft_wrap=True)
    if moved := report.moved:
        console.print(
            f"  without the base's quantization mean logprobs moved by {moved.mean:.2g} nats per token on average, "
            f"{moved.most:.2g} at most ({moved.pairs} pairs of {moved.ref_cache})",
            highlight=False,
            soft_wrap=True,
        )


def show_verify(console: Console, worst: float) -> None:
    console.print(
        Text.assemble(CHECK, f" the model reproduces the sample re-scored, within {worst:.1g} nats per token")
    )


def show_export_cache(console: Console, report: "ExportCacheReport") -> None:
    console.print(
        Text.assemble(
            CHECK, f" {report.pairs:,} pairs in ", (str(report.out), "bold"), f", identity {report.identity}"
        ),
        soft_wrap=True,
    )
    card = (
        f"its card is {report.card}"
        if report.card
        else "no card: the file of its name is not this program's, and stays"
    )
    console.print(Text(f"  {card}"), soft_wrap=True)
    if report.odd:
        console.print(
            f"  {report.odd:,} pairs count other tokens than just the whole of their answers: a program without loss masks, "
            "as TRL, would compare other sums",
            style="yellow",
        )


def show_import(console: Console, report: "ImportReport", model: str | None) -> None:
    show_sources(console, report.sources)
    cache = str(report.ref_cache)
    console.print(
        Text.assemble(
            CHECK,
            f" {report.pairs:,} pairs, {report.blocks:,} blocks in ",
            (cache, "bold"),
            f", identity {report.identity}",
        ),
        soft_wrap=True,
    )
    check = f"minidpo inspect-cache {cache} --verify --model {model or 'MODEL'}"
    console.print(f"  to score some of them again: {check}", highlight=False, soft_wrap=True)
