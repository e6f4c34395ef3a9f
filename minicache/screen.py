"""What a person sees: progress, live metrics, and the reports of the stages. rich only; no torch."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from minicache.text import ranges, visible
from minicache.trackers import Silent

if TYPE_CHECKING:
    from minicache.stages.compare_page import Answers
    from minicache.stages.evaluate import EvaluateReport
    from minicache.stages.export import ExportReport
    from minicache.stages.merge import MergeReport
    from minicache.stages.precompute import PrecomputeReport
    from minicache.stages.train import TrainReport

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
    """Pairs done, tokens a second, time gone and time left; of a phase of unknown length only the time gone."""

    def render(self, task: Task) -> Text:
        gone = task.elapsed or 0.0
        if not task.total:
            return Text(_duration(gone), style="dim")
        rate = f"  {task.fields['tokens'] / gone:,.0f} tokens/s" if gone and task.fields["tokens"] else ""
        left = f"  {_duration(task.time_remaining)} left" if task.time_remaining is not None else ""
        return Text(f"{task.completed:,.0f}/{task.total:,.0f} pairs{rate}{left}", style="cyan")


class Screen(Silent):
    """The tracker that draws. On a terminal a live display, elsewhere (a log file) plain lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.rows: deque[tuple[int, dict[str, float]]] = deque(maxlen=LIVE_ROWS)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            Numbers(),
            console=console,
        )
        self.task: Any = None
        self.live = Live(console=console, get_renderable=self._picture, refresh_per_second=4, transient=True)

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
        text = "  ".join(f"[dim]{name}[/] {facts[name]}" for name in shown if name in facts)
        self.console.print(Panel(text, title=escape(title), title_align="left", border_style="cyan"))

    def begin(self, phase: str, pairs: int | None) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.rows.clear()
        self.task = self.progress.add_task(escape(phase), total=pairs, tokens=0)
        if self.console.is_terminal:
            self.live.start(refresh=True)
        else:
            self.console.print(Text(phase + (f": {pairs:,} pairs" if pairs else "")))

    def advance(self, pairs: int, tokens: int) -> None:
        task = next(task for task in self.progress.tasks if task.id == self.task)
        self.progress.update(self.task, advance=pairs, tokens=task.fields["tokens"] + tokens)
        if not self.console.is_terminal and task.total and not self.rows:  # a training step has a line of its own
            self._tell_tenths(task, pairs)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "eval/loss" in metrics:
            shown = {"loss": ".4f", "rewards/accuracy": ".1%", "rewards/margin": "+.4f", "kl": ".3g"}
            numbers = "  ".join(f"{name} {metrics[f'eval/{name}']:{form}}" for name, form in shown.items())
            self.console.print(Text(f"after {step} steps, held-out pairs:  {numbers}"), soft_wrap=True)
        if "loss" not in metrics:
            return
        self.rows.append((step, metrics))
        if not self.console.is_terminal:
            numbers = "  ".join(f"{head} {_number(metrics, name)}" for name, (head, _) in COLUMNS.items())
            self.console.print(Text(f"step {step}  {numbers}"), soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(Text(visible(text)), style="dim")

    def close(self) -> None:
        self.live.stop()

    def _tell_tenths(self, task: Task, pairs: int) -> None:
        """A line at each tenth of the way, where there is no bar to watch."""
        total = task.total or 1
        if int(10 * task.completed / total) > int(10 * (task.completed - pairs) / total):
            rate = task.fields["tokens"] / (task.elapsed or 1)
            left = (task.elapsed or 0) * (total - task.completed) / max(task.completed, 1)
            self.console.print(
                f"  {task.completed:,.0f} of {total:,.0f} pairs, {rate:,.0f} tokens/s, {_duration(left)} left",
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
    return format(metrics[name], COLUMNS[name][1]) if name in metrics else ""


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


# --- reports, one function a stage ---


def show_error(console: Console, message: str) -> None:
    """One red line."""
    console.print(Text(visible(f"error: {' '.join(message.split())}"), style="bold red"), soft_wrap=True)


def show_precompute(console: Console, report: "PrecomputeReport") -> None:
    console.print(sources_table([asdict(source) for source in report.sources]))
    scored = f"{report.scored:,} scored now" if report.scored else "nothing left to score"
    console.print(
        f"[bold green]✓[/] {report.pairs:,} pairs in [bold]{escape(str(report.ref_cache))}[/], {scored}",
        highlight=False,
    )
    if report.shard:
        console.print(Text(_shard_lines(report)), highlight=False)
    if any(source.refused for source in report.sources):
        console.print(f"  refused rows, line by line: {escape(str(report.refused_file))}", highlight=False)


def _shard_lines(report: "PrecomputeReport") -> str:
    mine = f"blocks {ranges(report.scored_blocks)}" if report.scored_blocks else "no block: none of its blocks was left"
    missing = f"not complete: {len(report.missing):,} of {report.blocks:,} blocks are missing: {ranges(report.missing)}"
    state = missing if report.missing else f"complete: all {report.blocks:,} blocks are scored"
    return f"  shard {report.shard} scored {mine}\n  the cache is {state}"


def show_merge(console: Console, report: "MergeReport") -> None:
    for path, pairs in report.given:
        console.print(Text(f"  {pairs:,} pairs of {visible(str(path))}"))
    console.print(
        f"[bold green]✓[/] {report.pairs:,} pairs, {report.blocks:,} blocks in [bold]{escape(visible(str(report.ref_cache)))}[/]; "
        f"{report.twice:,} pairs were in more than one cache and are kept once",
        highlight=False,
    )


def sources_table(sources: Iterable[Mapping[str, Any]]) -> Table:
    """What was read of each file: kept, duplicate, truncated, refused by reason."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("file", overflow="fold")
    for heading in ("rows", "kept", "duplicate", "truncated", "refused"):
        table.add_column(heading, justify="right")
    for source in sources:
        refused = ", ".join(f"{count:,} {reason}" for reason, count in sorted(source["refused"].items())) or "0"
        numbers = (f"{source[name]:,}" for name in ("rows", "kept", "duplicates", "truncated"))
        table.add_row(Text(visible(source["name"])), *numbers, Text(refused))
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
            f"accuracy {held['rewards/accuracy']:.1%}, kl {held['kl']:.3g}",
            highlight=False,
        )
    console.print(
        f"[bold green]✓[/] {progress.step:,} steps in {_duration(progress.total_seconds)}: loss {first['loss']:.4f} → "
        f"{last['loss']:.4f}{start}; policy in [bold]{escape(str(report.model_dir))}[/]",
        highlight=False,
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
    plain = asked["loss"] == "sigmoid" and not asked["sft_weight"] and not asked["wpo"]  # ln 2 where nothing has moved
    rows = [
        (
            "prefers chosen (its own logprobs)",
            f"{metrics['accuracy/reference']:.1%}",
            f"{metrics['accuracy/policy']:.1%}",
        ),
        ("implicit reward prefers chosen", "–", f"{metrics['rewards/accuracy']:.1%}"),
        ("reward margin", "0", f"{metrics['rewards/margin']:+.4f}"),
        ("loss", "0.6931" if plain else "–", f"{metrics['loss']:.4f}"),
        ("moved from the reference (KL, nats a token)", "0", f"{metrics['kl']:.3g}"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if report.same_weights:
        console.print("The policy has the reference's own weights.", style="dim")


def show_answers(console: Console, answers: Sequence["Answers"]) -> None:
    for number, item in enumerate(answers, start=1):
        prompt = f"{number}/{len(answers)}  {item.prompt}" if len(answers) > 1 else item.prompt
        title = Text(visible(prompt))
        table = Table(
            box=SIMPLE_HEAD, header_style="bold", pad_edge=False, title=title, title_justify="left", expand=True
        )
        table.add_column("reference", ratio=1)
        table.add_column("policy", ratio=1)
        table.add_row(_answer(item.reference, item.reference_cut), _answer(item.policy, item.policy_cut))
        console.print(table)


def _answer(text: str, cut: bool) -> Text:
    """cut: the longest length allowed ended it."""
    shown = Text(visible(text)) if text else Text("(no answer)", style="dim")
    return shown.append(" … (cut)", style="dim") if cut else shown


def show_file(console: Console, file: Path) -> None:
    console.print(f"[bold green]✓[/] [bold]{escape(visible(str(file)))}[/]", highlight=False, soft_wrap=True)


def show_export(console: Console, report: "ExportReport") -> None:
    size = f"{report.parameters / 1e6:,.1f} million parameters in {report.dtype}"
    console.print(
        f"[bold green]✓[/] {size}; load it as [bold]{escape(report.name)}[/]", highlight=False, soft_wrap=True
    )


def show_verify(console: Console, worst: float) -> None:
    console.print(
        f"[bold green]✓[/] the model reproduces the sample re-scored, within {worst:.1g} nats a token", highlight=False
    )
