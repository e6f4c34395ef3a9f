"""Curves of runs, drawn over each other."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicache.errors import DataError
from minicache.options.objective import starts_at_ln_2
from minicache.pictures.frame import CHOSEN, HELD_OUT, INK, NEUTRAL, REJECTED, RUNS, frame, label, picture
from minicache.reports.curves import Curve
from minicache.reports.names import EVAL, PANELS, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


CROWDED = 150  # logged steps from which a curve is drawn thin


@dataclass(frozen=True)
class RunCurves:
    """One run. curves: metric -> its steps and values. facts: what its run.json says, {} if it has none."""

    name: str
    curves: dict[str, Curve]
    facts: dict[str, Any]


def draw_runs(runs: list[RunCurves], file: Path, smooth: float = 0.0) -> None:
    """Write a grid of panels over the steps; panels that no run has a number for are left out.

    smooth: weight of the past in a running mean, 0 to below 1; the curve as logged stays behind it, faint.

    Raises:
        ConfigError: as `check_picture`. DataError: no panel has a number. OutputError: the file cannot be written.
    """
    drawn = {name for run in runs for name in run.curves}
    panels = [panel for panel in PANELS if any(drawn & {name, EVAL + name} for name in panel.metrics)]
    if not panels:
        raise DataError(
            f"{', '.join(run.name for run in runs)}: none of the metrics that are drawn has been logged yet"
        )
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    with picture(file, (4.1 * columns, 2.9 * rows + 0.7)) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for panel, axis in zip(panels, axes, strict=False):
            _draw_panel(axis, panel, runs, smooth)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        _legend(figure, runs, drawn)


def _draw_panel(axis: "Axes", panel: Panel, runs: list[RunCurves], smooth: float) -> None:
    frame(axis, panel.title, "step", panel.unit_of([run.facts for run in runs]))
    level = panel.level_of(from_ln_2=all(starts_at_ln_2(run.facts) for run in runs))
    if level is not None:
        axis.axhline(level, color="#9a9a9a", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    for number, run in enumerate(runs):
        for metric in panel.metrics:
            color = _color(number, metric, len(runs))
            style = "--" if len(runs) > 1 and metric.endswith("/rejected") else "-"
            # the learning rate is no measurement: nothing to smooth
            if metric in run.curves:
                _draw_curve(axis, run.curves[metric], color, style, smooth if metric != "lr" else 0.0)
            if EVAL + metric in run.curves:
                steps, values = run.curves[EVAL + metric]
                # another colour than the noisy curve behind it
                color = HELD_OUT if color == NEUTRAL and len(runs) == 1 else color
                axis.plot(steps, values, color=color, linestyle=style, linewidth=1, marker="o", markersize=4.5,
                          markerfacecolor="white", markeredgewidth=1.2, zorder=4)  # fmt: skip
    # full values at the ticks, no offset above the axis
    axis.yaxis.set_major_formatter("{x:.3g}")
    if panel.unit == "share of pairs":
        axis.set_ylim(-0.04, 1.04)


def _color(number: int, metric: str, runs: int) -> str:
    """By side where there is one run, by run where there are several."""
    if runs > 1:
        return RUNS[number % len(RUNS)]
    return {"chosen": CHOSEN, "rejected": REJECTED}.get(metric.rpartition("/")[2], NEUTRAL)


def _draw_curve(axis: "Axes", curve: Curve, color: str, style: str, smooth: float) -> None:
    steps, values = curve
    marker = "o" if len(steps) == 1 else None
    if smooth:
        axis.plot(steps, values, color=color, linewidth=0.8, alpha=0.3, zorder=2)
        values = smoothed(values, smooth)
    width = 1.7 if smooth or len(steps) < CROWDED else 1.0
    axis.plot(steps, values, color=color, linestyle=style, linewidth=width, marker=marker, zorder=3)


def smoothed(values: list[float], weight: float) -> list[float]:
    """Exponential running mean: a value has `weight` times the weight of the one after it, with no bias towards 0 at the start.

    Adam's bias correction (Kingma & Ba 2015, algorithm 1). A value that is not finite is skipped.
    """
    total = norm = 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + value, weight * norm + 1
        means.append(total / norm if norm else math.nan)
    return means


def _legend(figure: "Figure", runs: list[RunCurves], drawn: set[str]) -> None:
    from matplotlib.lines import Line2D

    def line(color: str, **style: Any) -> Line2D:
        return Line2D([], [], color=color, linewidth=1.7, **style)

    if len(runs) > 1:
        entries = [(line(_color(number, "", len(runs))), run.name) for number, run in enumerate(runs)]
        entries += [(line(INK), "chosen"), (line(INK, linestyle="--"), "rejected")]
    else:
        figure.suptitle(label(runs[0].name), fontsize=13, fontweight="bold", color=INK)
        entries = [(line(CHOSEN), "chosen"), (line(REJECTED), "rejected")]
    if any(name.startswith(EVAL) for name in drawn):
        entries.append(
            (
                line(INK if len(runs) > 1 else HELD_OUT, marker="o", markersize=4.5, markerfacecolor="white"),
                "validation",
            )
        )
    handles, labels = zip(*entries, strict=True)
    figure.legend(
        handles,
        [label(name) for name in labels],
        loc="outside lower center",
        ncols=min(len(entries), 7),
        frameon=False,
    )
