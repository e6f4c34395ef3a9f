"""benchmarks/results/*.json -> bench.png: pairs per second of both stages, and memory. `python -m benchmarks.picture`"""

from pathlib import Path
from typing import Any

from benchmarks.case import LIVE, OURS, TRL, TRL_PRECOMPUTED
from benchmarks.results import RESULTS, TITLES, load_reports

COLORS = {OURS: "#2a78d6", LIVE: "#8a8985", TRL: "#c9a227", TRL_PRECOMPUTED: "#7a5ea8"}
PANELS = (
    ("stage one", "pairs_per_second", "stage one: pairs per second"),
    ("stage two", "pairs_per_second", "stage two: pairs per second"),
    ("stage two", "peak_gb", "stage two: peak GB above the weights"),
)


def draw() -> Path | None:
    """Draw all reports. Returns the path of the picture; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    reports = load_reports()
    figure = Figure(figsize=(12, 2.2 * len(reports)), layout="constrained")
    grid = figure.subplots(len(reports), len(PANELS), squeeze=False)
    for axes, (name, report) in zip(grid, reports.items(), strict=True):
        for axis, (stage, key, title) in zip(axes, PANELS, strict=True):
            _bars(axis, {one: values[key] for one, values in report[stage].items() if key in values})
            axis.set_title(title, fontsize=9, loc="left")
        axes[0].set_ylabel(TITLES.get(name, name).replace(", ", "\n"), fontsize=9)
    path = RESULTS / "bench.png"
    figure.savefig(path, dpi=110)
    return path


def _bars(axis: Any, values: dict[str, float]) -> None:
    bars = axis.barh(list(values), list(values.values()), color=[COLORS[name] for name in values])
    axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    print(draw())
