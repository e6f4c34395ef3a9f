"""Histograms of a cache."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicache.errors import ConfigError
from minicache.pictures.frame import CHOSEN, INK, REJECTED, frame, label, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from minicache.reports.inspection import Histogram, Inspection, MarginHistogram


def draw_inspection(inspection: "Inspection", file: Path) -> None:
    """Write histograms of lengths, mean logprobs and margins of a cache.

    Raises:
        ConfigError: there is nothing to draw yet, or as `check_picture`. OutputError: the file cannot be written.
    """
    histograms: list[tuple[str, Any, str, Callable[..., None]]] = [
        ("tokens of a side", inspection.length_histogram, "tokens", _draw_sides),
        ("reference's mean logprob", inspection.logp_histogram, "nats per token", _draw_sides),
        ("reference's margin, chosen − rejected", inspection.margin_histogram, "nats per token", _draw_margins),
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
            label(f"{inspection.path}: {inspection.pairs:,} pairs"), fontsize=13, fontweight="bold", color=INK
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
