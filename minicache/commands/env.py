"""`minidpo env`."""

from minicache.commands.assemble import Given, command_of, extra_parameter
from minicache.commands.extras import JSON
from minicache.commands.running import errors_as_one_line, out, print_json


@command_of([extra_parameter(JSON)])
def env(given: Given) -> None:
    """Versions, devices and extras of this machine, for a bug report."""
    from minicache.reports.environment import look_around
    from minicache.screen.env import show_environment

    with errors_as_one_line():
        found = look_around()
        print_json(out, found) if given.json else show_environment(out, found)
