"""`minidpo report`: its options."""

from pathlib import Path
from typing import Annotated

import typer

from minicache.commands.running import errors_as_one_line, out
from minicache.options.others import ReportConfig
from minicache.screen.results import show_file


def report(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Written over what is there. (Default: report.html in the run.)")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="What compare --jsonl wrote. (Default: answers.jsonl or compare.jsonl in the run.)"),
    ] = None,
) -> None:
    """A training run as one page: options, curves, held-out figures, answers before and after. Needs no torch."""
    from minicache.stages.report import write_run_page

    with errors_as_one_line():
        show_file(out, write_run_page(ReportConfig(run, out_file, answers)))
