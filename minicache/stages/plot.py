"""The curves of runs as a picture, from their metrics.jsonl. No torch."""

from pathlib import Path
from typing import Any

from minicache.disk import check_writable, read_json
from minicache.errors import OutputError
from minicache.options.others import PlotConfig
from minicache.pictures.frame import check_picture
from minicache.pictures.runs import RunCurves, draw_runs
from minicache.reports.curves import FACTS, METRICS, PICTURE, names_apart, read_curves


def plot(config: PlotConfig) -> Path:
    """Draw the curves of all runs into one picture; returns the file.

    Raises:
        ConfigError: an unknown kind of picture, or matplotlib is missing. DataError: a run has no metrics yet.
        OutputError: the file cannot be written.
    """
    runs = [run.parent if run.name == METRICS else run for run in config.runs]
    file = config.out or (runs[0] / PICTURE if len(runs) == 1 else Path(PICTURE))
    check_picture(file)
    names = names_apart(runs)
    curves = [RunCurves(name, read_curves(run), _facts(run)) for name, run in zip(names, runs, strict=True)]
    check_writable(file)
    draw_runs(curves, file, config.smooth)
    return file


def _facts(run: Path) -> dict[str, Any]:
    """The entries of run.json; {} if it cannot be read, because the picture takes only the names of units from it."""
    try:
        return read_json(run / FACTS)
    except OutputError:
        return {}
