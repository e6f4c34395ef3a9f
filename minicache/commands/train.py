"""`minidpo train`."""

from pathlib import Path
from typing import Any

import typer

from minicache.commands.assemble import Given, command_of, parameters_of
from minicache.commands.extras import DEVICE, NPROC, RECIPE, in_panel
from minicache.commands.running import errors_as_one_line, note, run_stage
from minicache.errors import OutputError
from minicache.options.recipes import recipe
from minicache.options.train import MEMORY, TrainConfig
from minicache.options.unused import require_read, unread
from minicache.screen.results import show_train
from minicache.training.run_directory import run_facts

EXTRAS = {"resume": RECIPE, "compile": in_panel(NPROC, MEMORY), "dtype": in_panel(DEVICE, MEMORY)}


@command_of(parameters_of(TrainConfig, EXTRAS, optional=("ref_cache",)))
def train(given: Given) -> None:
    """Stage two: train the policy against a reference cache. Model, tokenizer and pairs come from the cache."""
    with errors_as_one_line("train --resume goes on from the newest checkpoint, if there is one"):
        options = single_cache(given.options)
        before = facts_to_resume(options) if options.get("resume") else {}
        if "ref_cache" not in {**before, **options}:
            raise typer.BadParameter("missing; name the directory precompute-ref wrote", param_hint="--ref-cache")
        of_recipe = recipe(given.extras["recipe"])
        config = Given(options, given.extras).config(TrainConfig, {**before, **of_recipe})
        require_read(config, options)
        note(unread(config, of_recipe.keys() - options.keys()))
        run_stage("train", config, given.nproc, show_train, given.device)


def single_cache(options: dict[str, Any]) -> dict[str, Any]:
    """The same options, in which a single reference cache is not a list: run.json holds it as text."""
    several = options.get("ref_cache")
    return {**options, "ref_cache": several[0]} if several and len(several) == 1 else options


def facts_to_resume(options: dict[str, Any]) -> dict[str, Any]:
    """The options in run.json of the run to resume; empty if there is no run yet and a cache to begin one.

    Raises:
        OutputError: there is no run, and no --ref-cache to begin one.
    """
    out = Path(options["out"])
    # Whether to run a model's code is for the person at this machine to say, not for a directory that may be a stranger's.
    facts = {name: value for name, value in run_facts(out).items() if name != "trust_remote_code"}
    if not facts and "ref_cache" not in options:
        raise OutputError(f"{out}: no run to resume (it has no run.json); check --out, or begin with --ref-cache")
    return facts
