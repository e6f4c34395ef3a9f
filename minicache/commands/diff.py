"""`minidpo diff`."""

from minicache.commands.assemble import Given, command
from minicache.commands.extras import JSON
from minicache.commands.running import errors_as_one_line, out, print_json
from minicache.options.others import DiffConfig
from minicache.screen.diff import show_diff


@command(DiffConfig, after={"b": JSON})
def diff(given: Given) -> None:
    """Differences between two reference caches: options, files, pairs, and values of the pairs in both. Needs no torch."""
    from minicache.stages.diff import diff as find

    with errors_as_one_line():
        config = given.config(DiffConfig)
        report = find(config.a, config.b)
        print_json(out, report) if given.json else show_diff(out, report)
