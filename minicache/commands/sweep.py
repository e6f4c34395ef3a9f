"""`minidpo sweep`: train's own options, those that matter with several values."""

import inspect
from copy import copy
from typing import Annotated, Any, get_args

import typer

from minicache.commands.running import Json, errors_as_one_line, given_by_user, print_json, run_stage
from minicache.commands.train import train
from minicache.options.recipes import recipe as preset
from minicache.options.sweep import SWEPT, sweep_config
from minicache.screen.sweep import show_sweep

PANEL = "Swept: a value, or several separated by commas"
HELP = {
    "out": "The directory of the sweep: a run directory for each combination is made in it, or gone on with.",
    "ref_cache": "The reference cache, or several, as train takes them.",
    "loss": "Preference losses (docs/training.md lists them). A value with a colon is one mixture; repeat --loss for more: "
    "--loss sigmoid:0.8,hinge:0.2 --loss ipo,hinge.",
}
SHARD_HELP = "Be job K of N that share one sweep, each doing its own runs."


def sweep(**given: Any) -> None:
    """Stage two for every combination of some options, one run after another from one cache; a table and a picture of them."""
    ctx, as_json, nproc = given["ctx"], given["as_json"], given["nproc"]
    with errors_as_one_line("the same command goes on with the sweep"):
        asked = given_by_user(ctx)
        if len(given["ref_cache"]) == 1:
            asked["ref_cache"] = given["ref_cache"][0]
        run_stage("sweep", sweep_config(asked, preset(given["recipe"])), nproc, print_json if as_json else show_sweep)


def _parameters() -> list[inspect.Parameter]:
    """Those of train: each stands there once, with its type, default and help."""
    taken = inspect.signature(train).parameters
    parameters = [_as_swept(each) for name, each in taken.items() if name != "resume"]
    shard = Annotated[str | None, typer.Option("--shard", metavar="K/N", help=SHARD_HELP)]
    for name, kind, default in (("shard", shard, None), ("as_json", Json, False)):
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
    return [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]


def _as_swept(parameter: inspect.Parameter) -> inspect.Parameter:
    name = parameter.name
    if name not in SWEPT and name not in HELP:
        return parameter
    kind, info = get_args(parameter.annotation)
    info, default = copy(info), parameter.default
    info.help = HELP.get(name, info.help)
    if name in SWEPT:
        info.help, info.rich_help_panel = f"{info.help} (Default: {default}.)", PANEL
        kind, default = list[str] | None, None
    elif name == "ref_cache":
        kind, default = list[str], inspect.Parameter.empty
    return parameter.replace(annotation=Annotated[kind, info], default=default)


sweep.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
