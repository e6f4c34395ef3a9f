"""`minidpo compare`."""

from minicache.commands.assemble import DEVICE, JSON, Given, command
from minicache.commands.running import errors_as_one_line, out, print_json, run_stage
from minicache.options.others import CompareConfig
from minicache.screen.results import show_answers, show_file


@command(CompareConfig, after={"batch_size": DEVICE, "trust_remote_code": JSON})
def compare(given: Given) -> None:
    """Let reference and policy answer the same prompts, side by side: on the screen, as JSON lines, as a page to vote on."""
    with errors_as_one_line():
        config = given.config(CompareConfig)
        run_stage("compare", config, 1, print_json if given.json else show_answers, given.device)
        for file in filter(None, () if given.json else (config.jsonl, config.html)):
            show_file(out, file)
