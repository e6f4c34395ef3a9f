"""Progress and live metrics in a terminal or a log file. rich only; no torch."""

import math
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from minicache.reports.names import EVAL, METRICS, SUMMARY, moved
from minicache.screen.console import Lines
from minicache.trackers import Silent

LIVE_ROWS = 12  # log lines that stay in view
COLUMNS = {  # metric -> heading, format: what 80 columns have room for
    "loss": ("loss", ".4f"),
    "rewards/margin": ("margin", "+.4f"),
    "rewards/accuracy": ("acc", ".0%"),
    "logps/chosen": ("chosen", ".3f"),
    "logps/rejected": ("rejected", ".3f"),
    "kl": ("kl", ".2g"),
    "lr": ("lr", ".1e"),
    "grad_norm": ("grad", ".2f"),
    "tokens_per_second": ("tok/s", ",.0f"),
}


class Numbers(ProgressColumn):
    """Pairs done, tokens per second and time left; the time elapsed alone where the length of the phase is not known."""

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        if not task.total:
            return Text(duration(elapsed), style="dim")
        rate = f"  {task.fields['tokens'] / elapsed:,.0f} tokens/s" if elapsed and task.fields["tokens"] else ""
        left = f"  {duration(task.time_remaining)} left" if task.time_remaining is not None else ""
        return Text(f"{task.completed:,.0f}/{task.total:,.0f} pairs{rate}{left}", style="cyan")


class Screen(Silent):
    """The tracker that shows a stage: a live display on a terminal, plain lines elsewhere (a log file)."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.rows: deque[tuple[int, dict[str, float]]] = deque(maxlen=LIVE_ROWS)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            Numbers(),
            console=console,
        )
        self.task: Any = None
        self.live = Live(
            console=console,
            get_renderable=self._picture,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.redirected = ExitStack()

    def start(self, title: str, facts: dict[str, Any]) -> None:
        shown = (
            "pairs",
            "steps",
            "batch_size",
            "epochs",
            "loss",
            "logps",
            "beta",
            "lr",
            "dtype",
            "device",
            "processes",
        )
        facts_ = [Text.assemble((name, "dim"), f" {facts[name]}") for name in shown if name in facts]
        text = Text("  ").join(facts_)
        self.console.print(Panel(text, title=Text(title), title_align="left", border_style="cyan"))

    def begin(self, phase: str, pairs: int | None) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.rows.clear()
        self.task = self.progress.add_task(phase, total=pairs, tokens=0)
        if self.console.is_terminal:
            if not self.live.is_started:
                self.redirected.enter_context(redirect_stdout(Lines(self.console, sys.stdout)))
                self.redirected.enter_context(redirect_stderr(Lines(self.console, sys.stderr)))
            self.live.start(refresh=True)
        else:
            self.console.print(Text(phase + (f": {pairs:,} pairs" if pairs else "")))

    def advance(self, pairs: int, tokens: int) -> None:
        task = next(task for task in self.progress.tasks if task.id == self.task)
        self.progress.update(self.task, advance=pairs, tokens=task.fields["tokens"] + tokens)
        # a training step has a line of its own
        if not self.console.is_terminal and task.total and not self.rows:
            self._log_tenths(task, pairs)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if EVAL + "loss" in metrics:
            numbers = "  ".join(
                f"{name} {metrics[EVAL + name]:{METRICS[name].form}}" for name in SUMMARY if EVAL + name in metrics
            )
            self.console.print(Text(f"after {step} steps, held-out pairs:  {numbers}"), soft_wrap=True)
        if "loss" not in metrics:
            return
        self.rows.append((step, metrics))
        if not self.console.is_terminal:
            numbers = "  ".join(f"{head} {_number(metrics, name)}" for name, (head, _) in COLUMNS.items())
            self.console.print(Text(f"step {step}  {numbers}"), soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(Text(text), style="dim")

    def close(self) -> None:
        self.live.stop()
        self.redirected.close()

    def _log_tenths(self, task: Task, pairs: int) -> None:
        """Print a line at each tenth of the phase."""
        total = task.total or 1
        if int(10 * task.completed / total) > int(10 * (task.completed - pairs) / total):
            rate = task.fields["tokens"] / (task.elapsed or 1)
            left = (task.elapsed or 0) * (total - task.completed) / max(task.completed, 1)
            self.console.print(
                f"  {task.completed:,.0f} of {total:,.0f} pairs, {rate:,.0f} tokens/s, {duration(left)} left",
                highlight=False,
            )

    def _picture(self) -> Group:
        return Group(*([metrics_table(self.rows)] if self.rows else []), self.progress)


def metrics_table(rows: Iterable[tuple[int, Mapping[str, float]]]) -> Table:
    """Logged steps as a table, one a line."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("step", *(heading for heading, _ in COLUMNS.values())):
        table.add_column(heading, justify="right", no_wrap=True)
    for step, metrics in rows:
        table.add_row(str(step), *(_number(metrics, name) for name in COLUMNS))
    return table


def _number(metrics: Mapping[str, float], name: str) -> str:
    shown = moved(metrics) if name == "kl" else name
    return format(metrics[shown], COLUMNS[name][1]) if shown in metrics else ""


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"  # of a run.json that was changed by hand
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
