"""`minidpo fit`."""

from minicache.commands.assemble import Given, command
from minicache.commands.extras import JSON
from minicache.commands.running import errors_as_one_line, print_json, run_stage
from minicache.options.fit import FitConfig
from minicache.screen.fit import show_fit


@command(FitConfig, after={"trust_remote_code": JSON})
def fit(given: Given) -> None:
    """What both stages need of a device's memory, and which options fit, from a model's config alone."""
    with errors_as_one_line():
        run_stage("fit", given.config(FitConfig), 1, print_json if given.json else show_fit)
