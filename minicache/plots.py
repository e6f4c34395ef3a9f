"""Pictures: curves of runs, histograms of a cache. matplotlib (an extra), no torch; a figure is drawn without any window."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicache.disk import written_whole
from minicache.errors import ConfigError, DataError
from minicache.runs import starts_at_ln_2
from minicache.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from minicache.inspection import Histogram, Inspection, MarginHistogram

SUFFIXES = (".png", ".svg", ".pdf")
CHOSEN, REJECTED, NEUTRAL, HELD_OUT = "#1b7f79", "#d1603d", "#3b5b92", "#c98a00"
RUNS = ("#3b5b92", "#d1603d", "#1b7f79", "#8a5aa8", "#b8860b", "#5b8c3a", "#c2477f", "#5f6b7a")
CHINESE = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "PingFang SC",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
)  # what may be there
GRID, INK = "#e3e3e3", "#33373d"
EVAL = "eval/"
CROWDED = 150  # logged steps from which a curve as logged needs a thin line

Curve = tuple[list[int], list[float]]  # steps, values; as many of one as of the other


@dataclass(frozen=True)
class RunCurves:
    """One run. curves: metric -> its steps and values. facts: what its run.json says, {} if it has none."""

    name: str
    curves: dict[str, Curve]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One part of the picture. metrics: what is drawn in it. level: a horizontal line to compare with."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    level: float | None = None


PANELS = (
    Panel("loss", "", ("loss",)),
    Panel("reward margin", "", ("rewards/margin",), 0.0),
    Panel("reward accuracy", "share of pairs", ("rewards/accuracy",), 0.5),
    Panel("rewards", "", ("rewards/chosen", "rewards/rejected"), 0.0),
    Panel("policy's logprobs", "{logps}", ("logps/chosen", "logps/rejected")),
    Panel("moved from the reference (KL)", "nats a token", ("kl",)),
    Panel("learning rate", "", ("lr",)),
    Panel("gradient norm, before clipping", "", ("grad_norm",)),
)
LOGPS_UNITS = {"mean": "nats a token", "sum": "nats an answer"}


def check_picture(file: Path) -> None:
    """Raises ConfigError: the file's name ends in no kind of picture we draw, or matplotlib is missing."""
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{file}: expected a name ending in {', '.join(SUFFIXES)}, got {file.suffix or 'no ending'}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(f"{file}: drawing needs matplotlib: pip install 'minicache[plot]'") from None


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
    kinds = {run.facts.get("logps", "mean") for run in runs}
    logps = LOGPS_UNITS.get(kinds.pop(), "nats") if len(kinds) == 1 else "nats: runs of mean and of sum"
    frame(axis, panel.title, "step", panel.unit.format(logps=logps))
    level = math.log(2) if panel.title == "loss" and all(starts_at_ln_2(run.facts) for run in runs) else panel.level
    if level is not None:
        axis.axhline(level, color="#9a9a9a", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    for number, run in enumerate(runs):
        for metric in panel.metrics:
            color = _color(number, metric, len(runs))
            style = "--" if len(runs) > 1 and metric.endswith("/rejected") else "-"
            if metric in run.curves:  # the learning rate is no measurement: nothing to smooth
                _draw_curve(axis, run.curves[metric], color, style, smooth if metric != "lr" else 0.0)
            if EVAL + metric in run.curves:
                steps, values = run.curves[EVAL + metric]
                color = HELD_OUT if color == NEUTRAL and len(runs) == 1 else color  # seen in front of a noisy curve
                axis.plot(steps, values, color=color, linestyle=style, linewidth=1, marker="o", markersize=4.5,
                          markerfacecolor="white", markeredgewidth=1.2, zorder=4)  # fmt: skip
    axis.yaxis.set_major_formatter("{x:.3g}")  # no offset above the axis: each number stands for itself
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
    """Running mean in which a value counts `weight` times what the one after it does; the first values count in full.

    Adam's bias correction (Kingma & Ba 2015, algorithm 1). A value that is no number is passed over.
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
        figure.suptitle(_label(runs[0].name), fontsize=13, fontweight="bold", color=INK)
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
        [_label(label) for label in labels],
        loc="outside lower center",
        ncols=min(len(entries), 7),
        frameon=False,
    )


def draw_inspection(inspection: "Inspection", file: Path) -> None:
    """Write histograms of lengths, mean logprobs and margins of a cache.

    Raises:
        ConfigError: there is nothing to draw yet, or as `check_picture`. OutputError: the file cannot be written.
    """
    histograms: list[tuple[str, Any, str, Callable[..., None]]] = [
        ("tokens of a side", inspection.length_histogram, "tokens", _draw_sides),
        ("reference's mean logprob", inspection.logp_histogram, "nats a token", _draw_sides),
        ("reference's margin, chosen − rejected", inspection.margin_histogram, "nats a token", _draw_margins),
    ]
    found = [item for item in histograms if item[1]]
    if not found:
        raise ConfigError(f"--plot: {inspection.path} holds no pairs that can be drawn yet; run precompute-ref again")
    with picture(file, (5 * len(found), 3.9)) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots(1, len(found), squeeze=False).flatten().tolist()
        for axis, (title, histogram, unit, draw) in zip(axes, found, strict=True):
            frame(axis, title, unit, "pairs")
            axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            draw(axis, histogram)
        figure.suptitle(
            _label(f"{inspection.path}: {inspection.pairs:,} pairs"), fontsize=13, fontweight="bold", color=INK
        )


def _draw_margins(axis: "Axes", histogram: "MarginHistogram") -> None:
    """Pairs in which the reference prefers rejected stand left of 0, in rejected's colour."""
    edges = histogram.edges
    width = [right - left for left, right in pairwise(edges)]
    colors = [CHOSEN if left >= 0 else REJECTED for left in edges[:-1]]
    axis.bar(edges[:-1], histogram.pairs, width, align="edge", color=colors, edgecolor="white", linewidth=0.7)
    axis.axvline(0, color=INK, linewidth=0.9)


def _draw_sides(axis: "Axes", histogram: "Histogram") -> None:
    edges = histogram.edges
    for name, counts, color in (("chosen", histogram.chosen, CHOSEN), ("rejected", histogram.rejected, REJECTED)):
        axis.stairs(counts, edges, fill=True, color=color, alpha=0.28)
        axis.stairs(counts, edges, color=color, linewidth=1.6, label=name)
    axis.legend(frameon=False)


# --- what every picture shares ---


def frame(axis: "Axes", title: str, below: str, beside: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, loc="left", fontsize=11, color=INK)
    axis.set_xlabel(below, fontsize=9, color=INK)
    axis.set_ylabel(beside, fontsize=9, color=INK)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9, colors=INK)
    if below in ("step", "tokens"):
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


@contextmanager
def picture(file: Path, inches: tuple[float, float]) -> Iterator["Figure"]:
    """A figure to draw on; written whole when the block ends, the same bytes for the same numbers."""
    check_picture(file)
    import warnings

    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    kind = file.suffix.lower()[1:]
    installed = set(font_manager.get_font_names())
    options: Any = {
        "font.family": ["DejaVu Sans", *(name for name in CHINESE if name in installed)],
        "text.parse_math": False,
        "svg.hashsalt": "minicache",
    }
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context(options), warnings.catch_warnings(), written_whole(file) as draft:
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a box in a run's name is no reason to stop
        figure = Figure(figsize=inches, layout="constrained", facecolor="white")
        yield figure
        figure.savefig(draft, format=kind, dpi=150, metadata=dates.get(kind))


def _label(text: str) -> str:
    """A name as matplotlib takes it: what begins with an underscore it would leave out of a legend."""
    shown = visible(text).replace("\n", "␊")
    shown = shown if len(shown) <= 60 else f"…{shown[-59:]}"
    return f" {shown}" if shown.startswith("_") else shown
