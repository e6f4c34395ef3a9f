"""`minidpo compare`."""

from typing import TYPE_CHECKING

from rich.console import Console

from minicache.commands.assemble import Given, command
from minicache.commands.extras import DEVICE, JSON
from minicache.commands.running import errors_as_one_line, out, print_json, run_stage
from minicache.options.others import CompareConfig
from minicache.screen.compare import show_compared
from minicache.screen.results import show_file

if TYPE_CHECKING:
    from minicache.stages.compare import Compared


@command(CompareConfig, after={"batch_size": DEVICE, "trust_remote_code": JSON})
def compare(given: Given) -> None:
    """Let reference and policy answer the same prompts, side by side: on the screen, as JSON lines, as a page to vote on."""
    with errors_as_one_line():
        config = given.config(CompareConfig)
        run_stage("compare", config, 1, _print if given.json else show_compared, given.device)
        for file in filter(None, () if given.json else (config.jsonl, config.html)):
            show_file(out, file)


def _print(console: Console, compared: "Compared") -> None:
    """Print the answers as a JSON list; with a judge an object of `answers` and `judge`."""
    print_json(console, compared if compared.judge else compared.answers)
