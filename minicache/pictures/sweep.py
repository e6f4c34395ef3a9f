"""A sweep as a picture: held-out accuracy and margin against the distance from the reference, and against each swept number."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicache.options.declare import flag
from minicache.pictures.frame import INK, RUNS, frame, picture
from minicache.reports.names import METRICS, moved
from minicache.reports.sweep import RunResult, SweepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
MEASURES = {"rewards/accuracy": "share of pairs", "rewards/margin": ""}  # metric -> unit
FAR = 5  # largest value by smallest from which an axis is logarithmic


def draw_sweep(report: SweepReport, file: Path) -> None:
    """Accuracy and margin of the finished runs against KL, and against each option that has several numbers.

    Raises:
        ConfigError: matplotlib is missing. OutputError: the file cannot be written.
    """
    done = [result for result in report.runs if result.held_out]
    numbers = [name for name in report.swept if len(_numbers(name, done)) > 1]
    kind = next((name for name in report.swept if len({result.options[name] for result in done}) > 1), None)
    below = ["kl", *numbers]
    with picture(file, (4.3 * len(below), 6.6)) as figure:
        axes = figure.subplots(len(MEASURES), len(below), squeeze=False, sharey="row")
        for row, (metric, unit) in zip(axes, MEASURES.items(), strict=True):
            for axis, name in zip(row, below, strict=True):
                found = done[0].held_out or {}
                label = METRICS[moved(found)].name.replace(", nats", ",\nnats") if name == "kl" else flag(name)
                frame(axis, f"held-out {METRICS[metric].name}", label, unit)
                _draw(axis, done, name, metric, kind)
        handles, labels = axes[0][0].get_legend_handles_labels()
        if labels:
            title = flag(kind) if kind else ""
            figure.legend(
                handles, labels, title=title, loc="outside lower center", ncols=min(len(labels), 8), frameon=False
            )
        figure.suptitle(f"{len(done)} runs of {report.out}", fontsize=13, fontweight="bold", color=INK)


def _draw(axis: "Axes", done: list[RunResult], below: str, metric: str, kind: str | None) -> None:
    from matplotlib.ticker import LogLocator

    groups: dict[Any, list[tuple[float, float]]] = {}
    for result in done:
        assert result.held_out
        x = result.held_out[moved(result.held_out)] if below == "kl" else float(result.options[below])
        groups.setdefault(result.options[kind] if kind else "", []).append((x, result.held_out[metric]))
    for number, (value, points) in enumerate(sorted(groups.items())):
        xs, ys = zip(*sorted(points), strict=True)
        style: dict[str, Any] = {"color": RUNS[number % len(RUNS)], "markersize": 7, "markeredgewidth": 1.6}
        mark = MARKS[number % len(MARKS)]
        # hollow: runs with almost the same values are all seen
        axis.plot(xs, ys, mark, fillstyle="none", label=_shown(value) if kind else None, **style)
    values = sorted({x for points in groups.values() for x, _ in points})
    if values[0] > 0 and values[-1] >= FAR * values[0]:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(numticks=6))
        axis.xaxis.set_major_formatter("{x:g}")
    if below != "kl":
        axis.set_xticks(values, [format(value, "g") for value in values])
    # full values at the ticks, no offset above the axis
    axis.yaxis.set_major_formatter("{x:.4g}")
    axis.minorticks_off()


def _numbers(name: str, done: list[RunResult]) -> set[float]:
    values = {result.options[name] for result in done}
    return values if all(isinstance(value, int | float) for value in values) else set()


def _shown(value: Any) -> str:
    return format(value, "g") if isinstance(value, float) else str(value)
