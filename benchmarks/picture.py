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
    """Draw held-out accuracy by run, a panel for each data set, a point for each seed. known: the runs of outcome.json."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    runs = [run for run in known.values() if run]
    sets = list(dict.fromkeys(run["data"] for run in runs))
    figure = Figure(figsize=(6 * len(sets), 5), layout="constrained")
    for axis, data in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        here = [run for run in runs if run["data"] == data]
        names = list(dict.fromkeys(run["name"] for run in here))
        for run in here:
            held = run["held_out"]
            at, share = names.index(run["name"]), held["right"] / held["pairs"]
            color = COLORS[TRL if "TRL" in run["name"] else OURS]
            axis.plot([held["accuracy_low"], held["accuracy_high"]], [at, at], color=color, linewidth=1, alpha=0.5)
            axis.plot([share], [at], "o", color=color, markersize=5)
        axis.axvline(0.5, color=COLORS[LIVE], linewidth=0.8, linestyle="--")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(f"{data}: held-out reward accuracy, 95% intervals", fontsize=9, loc="left")
        axis.set_xlim(0, 1)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    path = RESULTS / "outcome.png"
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
