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


def draw_outcome(known: dict[str, dict[str, Any]]) -> Path | None:
    """Draw held-out accuracy and margin by run: a column for each data set, a point for each seed.

    known: the runs of outcome.json.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    sets = list(dict.fromkeys(run["data"] for run in known.values()))
    figure = Figure(figsize=(7 * len(sets), 9), layout="constrained")
    for column, data in zip(figure.subplots(2, len(sets), squeeze=False).T, sets, strict=True):
        here = [run for run in known.values() if run["data"] == data]
        for axis, figure_of in zip(column, ("accuracy", "margin"), strict=True):
            _points(axis, here, figure_of)
            axis.axvline({"accuracy": 0.5, "margin": 0.0}[figure_of], color=COLORS[LIVE], linewidth=0.8, linestyle="--")
            axis.set_title(f"{data}: held-out reward {figure_of}, 95% intervals", fontsize=9, loc="left")
        column[0].set_xlim(0, 1.02)
    path = RESULTS / "outcome.png"
    figure.savefig(path, dpi=110)
    return path


def _points(axis: Any, runs: list[dict[str, Any]], name: str) -> None:
    """A line for each kind of run, on it a point and an interval for each seed, one below the other."""
    kinds = list(dict.fromkeys(run["name"] for run in runs))
    for kind in kinds:
        seeds = [run["held_out"] for run in runs if run["name"] == kind]
        color = COLORS[TRL if "TRL" in kind else OURS]
        for seed, held in enumerate(seeds):
            at = kinds.index(kind) + 0.2 * (seed - (len(seeds) - 1) / 2)
            value = held["margin"] if name == "margin" else held["right"] / held["pairs"]
            axis.plot([held[f"{name}_low"], held[f"{name}_high"]], [at, at], color=color, linewidth=1, alpha=0.5)
            axis.plot([value], [at], "o", color=color, markersize=4)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def _bars(axis: Any, values: dict[str, float]) -> None:
    bars = axis.barh(list(values), list(values.values()), color=[COLORS[name] for name in values])
    axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    print(draw())
