"""Histograms and statistics of the columns of a cache."""

import math

import numpy as np

from minicache.reports.columns import Columns
from minicache.reports.inspection import Histogram, MarginHistogram

BINS = 16
SIDES = ("chosen", "rejected")


def length_statistics(columns: Columns) -> dict[str, dict[str, float]]:
    """Minimum, median, mean, 95th percentile and maximum of each kind of length."""
    values = {"prefix": columns.lengths[:, 0]}
    for side, name in enumerate(SIDES):
        values[name] = columns.sides[:, side]
        values[f"{name}_counted"] = columns.counted[:, side]
    return {
        name: {
            "min": int(column.min()),
            "median": float(np.median(column)),
            "mean": float(column.mean()),
            "p95": float(np.percentile(column, 95)),
            "max": int(column.max()),
        }
        for name, column in values.items()
    }


def histogram(values: np.ndarray, integers: bool = False) -> Histogram | None:
    """The histogram of (N, 2) values of chosen and rejected; None without values. integers: the values are whole numbers."""
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if integers:
        # Bounds between whole numbers: every bin covers equally many of them.
        width = max(1, -(-int(high - low + 1) // BINS))
        edges = np.arange(low, low + width * (int(high - low) // width + 1) + 1, width) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    counts = [np.histogram(values[:, side], edges)[0].tolist() for side in (0, 1)]
    return Histogram(edges.tolist(), *counts)


def margin_histogram(margins: np.ndarray) -> MarginHistogram | None:
    """The histogram of (N,) margins, nats per token; None without values. No bin contains values from both sides of 0."""
    if not len(margins):
        return None
    low, high = min(float(margins.min()), 0.0), max(float(margins.max()), 0.0)
    width = (high - low) / BINS or 1.0
    # One bin more at each end, so that rounding drops no value.
    edges = np.arange(math.floor(low / width) - 1, math.ceil(high / width) + 2) * width
    counts = np.histogram(margins, edges)[0]
    filled = np.flatnonzero(counts)
    first, last = int(filled[0]), int(filled[-1]) + 1
    return MarginHistogram(edges[first : last + 1].tolist(), counts[first:last].tolist())


def preference(columns: Columns) -> dict[str, float] | None:
    """The share of scored pairs in which the reference prefers chosen, by mean and by sum; None without scores."""
    if not columns.scored.any():
        return None
    mean = columns.logp_mean[columns.scored]
    total = mean * columns.counted[columns.scored]
    return {name: float((logps[:, 0] > logps[:, 1]).mean()) for name, logps in (("mean", mean), ("sum", total))}
