"""`minidpo plot`."""

from minicache.commands.assemble import Given, command
from minicache.commands.running import errors_as_one_line, out
from minicache.options.others import PlotConfig
from minicache.screen.results import show_file


@command(PlotConfig)
def plot(given: Given) -> None:
    """Draw loss, margins, accuracy, logprobs and more over the steps of one or several runs. Needs no torch."""
    from minicache.stages.plot import plot as draw

    with errors_as_one_line():
        show_file(out, draw(given.config(PlotConfig)))
