"""`minidpo import-cache`."""

from minicache.commands.assemble import Given, command
from minicache.commands.running import err, errors_as_one_line, out
from minicache.options.exchange import ImportConfig
from minicache.screen.live import Screen
from minicache.screen.results import show_import


@command(ImportConfig)
def import_cache(given: Given) -> None:
    """Create a reference cache from an export, or from preference rows with reference logprobs (TRL, open-instruct)."""
    from minicache.stages.import_cache import import_cache as bring_in

    with errors_as_one_line():
        config = given.config(ImportConfig)
        with Screen(err) as tracker:
            report = bring_in(config, tracker)
        show_import(out, report, config.model)
