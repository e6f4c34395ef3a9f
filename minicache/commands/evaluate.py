"""`minidpo evaluate`."""

from minicache.commands.assemble import Given, command
from minicache.commands.extras import DEVICE, JSON, NPROC
from minicache.commands.running import errors_as_one_line, print_json, run_stage
from minicache.options.others import EvaluateConfig
from minicache.screen.results import show_evaluate


@command(EvaluateConfig, after={"dtype": DEVICE, "scratch": NPROC, "trust_remote_code": JSON})
def evaluate(given: Given) -> None:
    """Preference accuracy, margin, KL estimate and loss of a policy on a (held-out) reference cache."""
    with errors_as_one_line():
        show = print_json if given.json else show_evaluate
        run_stage("evaluate", given.config(EvaluateConfig), given.nproc, show, given.device)
