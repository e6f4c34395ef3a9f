"""A sweep's runs as a table. rich only; no torch."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minicache.reports.names import METRICS, moved
from minicache.reports.sweep import RunResult, SweepReport
from minicache.screen.console import CHECK, UNMOVED

MEASURED = ("rewards/accuracy", "rewards/margin", "kl", "loss")  # columns: first what the runs are sorted by


def show_sweep(console: Console, report: SweepReport) -> None:
    console.print(_table(report))
    for result in report.runs:
        if result.problem:
            console.print(Text(f"{result.name}: {result.problem}", style="yellow"), soft_wrap=True)
    finished = sum(result.state == "done" for result in report.runs)
    console.print(
        Text.assemble(
            CHECK if any(result.model_step for result in report.runs) else UNMOVED,
            f" {finished} of {len(report.runs)} runs in ",
            (str(report.out), "bold"),
            ": measured on pairs held out, with each run's saved model",
        )
    )
    console.print(
        f"  about {_time(report.seconds_not_spent)} of reference passes not run: {report.reference_passes:,} pairs in training "
        f"steps (measured: {report.reference_pairs_per_second:,.1f} pairs/s forward on this machine); stage one ran over "
        f"{report.cached_pairs:,} (about {_time(report.stage_one_seconds)})",
        highlight=False,
    )


def _table(report: SweepReport) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for name in report.swept:
        table.add_column(name, no_wrap=True)
    for name in MEASURED:
        table.add_column(METRICS[name].heading, justify="right", no_wrap=True)
    table.add_column("saved at", justify="right", no_wrap=True)
    for result in report.runs:
        table.add_row(*(_shown(result.options[name]) for name in report.swept), *_numbers(result))
    return table


def _numbers(result: RunResult) -> list[str]:
    if result.held_out is None:
        return [result.state, *[""] * len(MEASURED)]
    found = result.held_out
    measured = [format(found[moved(found) if name == "kl" else name], METRICS[name].form) for name in MEASURED]
    return [*measured, f"{result.model_step:,} of {result.steps:,}"]


def _shown(value: object) -> Text:
    return Text(format(value, "g") if isinstance(value, float) else str(value))


def _time(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 90
        else f"{seconds / 60:,.1f} min"
        if seconds < 5400
        else f"{seconds / 3600:,.1f} h"
    )
