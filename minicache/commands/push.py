"""`minidpo push`."""

from minicache.commands.assemble import Given, command
from minicache.commands.extras import JSON
from minicache.commands.running import err, errors_as_one_line, out, print_json
from minicache.options.push import PushConfig
from minicache.screen.live import Screen
from minicache.screen.push import show_push


@command(PushConfig, after={"dry_run": JSON})
def push(given: Given) -> None:
    """Send a run's policy or a reference cache to the Hugging Face Hub, with a card. Needs no torch."""
    from minicache.stages.push import push as send

    again = "the same command goes on, and sends nothing twice that has arrived"
    with errors_as_one_line(again):
        config = given.config(PushConfig)
        with Screen(err) as tracker:
            report = send(config, tracker)
        print_json(out, report) if given.json else show_push(out, report)
