"""`minidpo report`."""

from minicache.commands.assemble import Given, command
from minicache.commands.running import errors_as_one_line, out
from minicache.options.others import ReportConfig
from minicache.screen.results import show_file


@command(ReportConfig)
def report(given: Given) -> None:
    """Write a training run as one HTML page: options, curves, validation, answers before and after. Needs no torch."""
    from minicache.stages.report import write_run_page

    with errors_as_one_line():
        show_file(out, write_run_page(given.config(ReportConfig)))
