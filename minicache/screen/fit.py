"""What both stages need of a device's memory, and the commands that fit it. rich only; no torch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from minicache.stages.fit import FitReport, Way


def show_fit(console: Console, report: "FitReport") -> None:
    """Print the report of `fit`: what is needed, how much fits, and what to type."""
    console.print(_needs(report))
    console.print(_room(report))
    for name, size in report.memory.items():
        _show_commands(console, report, name, size)


def _needs(report: "FitReport") -> Table:
    """A row for each way, in GB: what it needs before the first token slot, and a slot in MB."""
    several = report.devices > 1
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("GB on each device" if several else "GB", overflow="fold")
    headings = ["weights", "gradients", "optimizer", *(["processes"] if several else []), "head", "rest"]
    for heading in (*headings, "MB a slot", "checkpointed"):
        table.add_column(heading, justify="right")
    for plain, checkpointed in _rows(report.ways):
        copies = [plain.copies] if several else []
        parts = (plain.weights, plain.gradients, plain.optimizer, *copies, plain.head, plain.fixed)
        slots = [f"{plain.slot / 1e6:.2f}", f"{checkpointed.slot / 1e6:.2f}" if checkpointed else ""]
        table.add_row(plain.name, *(f"{part / 1e9:.2f}" for part in parts), *slots)
    table.caption = (
        f"{report.parameters / 1e9:,.2f} billion parameters, passes in {report.dtype}, {report.layout} pairs; the longest takes "
        f"{report.longest:,} token slots"
    )
    table.caption_justify = "left"
    return table


def _room(report: "FitReport") -> Table:
    """The largest batch in token slots for each way and memory."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("token slots that fit / with --activation-checkpointing", overflow="fold")
    for name in report.memory:
        table.add_column(_devices(report, name), justify="right")
    for plain, checkpointed in _rows(report.ways):
        cells = []
        for name in report.memory:
            sizes = [way.room[name] for way in (plain, checkpointed) if way]
            cells.append(" / ".join(f"{size:,}" if size else "–" for size in sizes))
        table.add_row(plain.name, *cells)
    return table


def _show_commands(console: Console, report: "FitReport", name: str, size: float) -> None:
    """Print the commands that fit a memory; of two that differ in checkpointing alone, the one without where it fits."""
    console.print(Text.assemble((_devices(report, name), "bold"), f" ({size / 1e9:,.1f} GB)"), soft_wrap=True)
    found = False
    for plain, checkpointed in _rows(report.ways):
        way = next((each for each in (plain, checkpointed) if each and name in each.commands), None)
        if way:
            found = True
            console.print(Text(f"  {way.commands[name]}"), soft_wrap=True)
    if not found:
        console.print("  nothing fits", style="yellow")


def _devices(report: "FitReport", name: str) -> str:
    return f"{report.devices} × {name}" if report.devices > 1 else name


def _rows(ways: Iterable["Way"]) -> list[tuple["Way", "Way | None"]]:
    """Each way without checkpointing, and the same with it, if its stage has it."""
    with_it = {(way.stage, way.name): way for way in ways if way.checkpointing}
    return [(way, with_it.get((way.stage, way.name))) for way in ways if not way.checkpointing]
