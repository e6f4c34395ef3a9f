"""Two caches, or a cache and the options of a command, side by side. rich only; no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minicache.errors import Difference

if TYPE_CHECKING:
    from minicache.reports.difference import DiffReport


def differences_table(differences: Sequence[Difference], sides: tuple[str, str]) -> Table:
    """The fields in which two identities differ, side by side."""
    table = _table("field", sides, "changes values")
    for field, *values, changes_values in differences:
        table.add_row(field, *(Text(str(value)) for value in values), "yes" if changes_values else "no")
    return table


def show_diff(console: Console, report: "DiffReport") -> None:
    """Print the report of `diff`."""
    if report.identity:
        console.print(differences_table(report.identity, _names(report)))
    else:
        console.print("one identity: the same model, tokenizer and options")
    console.print(_files(report))
    console.print(_pairs(report))
    if shared := report.shared:
        console.print(_values(report))
        if shared.farthest:
            console.print(_farthest(report))


def _names(report: "DiffReport") -> tuple[str, str]:
    return report.a.path, report.b.path


def _table(first: str, sides: tuple[str, str], *more: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in (first, *sides, *more):
        table.add_column(Text(heading), overflow="fold")
    return table


def _files(report: "DiffReport") -> Table:
    """The pairs that each cache kept of each preference file."""
    table = _table("file", _names(report))
    for file in report.files:
        table.add_row(Text(file.name), *("-" if kept is None else f"{kept:,} pairs" for kept in file.kept))
    return table


def _pairs(report: "DiffReport") -> Table:
    table = _table("pairs", _names(report))
    both = report.shared.pairs if report.shared else 0
    table.add_row("in both", f"{both:,}", f"{both:,}")
    table.add_row("only there", *(f"{side.only:,}" for side in (report.a, report.b)))
    if any(side.unreadable for side in (report.a, report.b)):
        table.add_row("blocks not looked at", *(side.unreadable_blocks for side in (report.a, report.b)))
    return table


def _values(report: "DiffReport") -> Table:
    """Differences of the reference logprobs of the pairs in both caches."""
    assert report.shared
    table = Table("|difference|, nats per token", "mean", "99 %", "largest", box=SIMPLE_HEAD, pad_edge=False)
    for name, spread in report.shared.differences.items():
        table.add_row(name, *(f"{value:.2g}" for value in (spread.mean, spread.p99, spread.largest)))
    table.caption = f"the preferred side differs in {report.shared.flipped:,} of {report.shared.pairs:,} pairs"
    table.caption_justify = "left"
    return table


def _farthest(report: "DiffReport") -> Table:
    """The pairs whose logprobs differ most."""
    assert report.shared
    table = Table("farthest apart", "chosen", "rejected", box=SIMPLE_HEAD, pad_edge=False)
    for pair in report.shared.farthest:
        chosen, rejected = (f"{a:.4f} / {b:.4f}" for a, b in zip(pair.logps_a, pair.logps_b, strict=True))
        table.add_row(Text(f"{pair.file}:{pair.line}"), chosen, rejected)
    return table
