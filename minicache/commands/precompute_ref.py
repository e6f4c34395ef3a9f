"""`minidpo precompute-ref`."""

from minicache.commands.assemble import Given, command
from minicache.commands.extras import DEVICE, NPROC, RECIPE
from minicache.commands.running import errors_as_one_line, run_stage
from minicache.options.recipes import recipe
from minicache.options.stage_one import PrecomputeConfig
from minicache.screen.results import show_precompute


@command(PrecomputeConfig, after={"tokenizer": RECIPE, "dtype": DEVICE, "shard": NPROC})
def precompute_ref(given: Given) -> None:
    """Stage one: run the frozen reference over all pairs, once. Repeat the command to resume, or with more data to append."""
    with errors_as_one_line("stage one goes on from its last finished block when run again"):
        config = given.config(PrecomputeConfig, recipe(given.extras["recipe"]))
        run_stage("precompute", config, given.nproc, show_precompute, given.device)
