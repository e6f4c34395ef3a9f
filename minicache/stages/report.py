"""A training run as one self-contained page. No torch."""

from pathlib import Path

from minicache.disk import check_writable, written_whole
from minicache.options.others import ReportConfig
from minicache.pages.run import ANSWERS, PAGE, run_page
from minicache.pages.run_answers import read_answers
from minicache.reports.curves import METRICS, read_curves
from minicache.training.run_directory import run_facts


def write_run_page(config: ReportConfig) -> Path:
    """Write the page of a run; returns the file.

    Raises:
        DataError: there is no run, it has no metrics yet, or the answers cannot be read. OutputError: the file cannot be written.
    """
    run = config.run.parent if config.run.name == METRICS else config.run
    logged = read_curves(run)
    file = config.out or run / PAGE
    found = config.answers or next((run / name for name in ANSWERS if (run / name).is_file()), None)
    answers = read_answers(found) if found else []
    check_writable(file)
    text = run_page(run, run_facts(run), logged, answers, file.resolve().parent)
    with written_whole(file) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")
    return file
