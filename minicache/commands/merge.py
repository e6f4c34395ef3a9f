"""`minidpo merge`."""

from minicache.commands.assemble import Given, command
from minicache.commands.running import err, errors_as_one_line, out
from minicache.options.others import MergeConfig
from minicache.screen.live import Screen
from minicache.screen.results import show_merge


@command(MergeConfig)
def merge(given: Given) -> None:
    """Merge several reference caches into one; a pair in more than one of them is kept once. Needs no torch."""
    from minicache.stages.merge import merge as join

    with errors_as_one_line():
        config = given.config(MergeConfig)
        with Screen(err) as tracker:
            report = join(config, tracker)
        show_merge(out, report)
