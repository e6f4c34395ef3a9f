"""`minidpo sweep`: the options of train, some of them with several values."""

import inspect
from dataclasses import MISSING, replace

from minicache.commands.assemble import Given, command_of, extra_parameter, parameter_of
from minicache.commands.extras import DEVICE, JSON, NPROC, RECIPE, in_panel
from minicache.commands.running import errors_as_one_line, note, print_json, run_stage
from minicache.commands.train import single_cache
from minicache.options.declare import Option, options_of
from minicache.options.recipes import recipe
from minicache.options.sweep import SHARD, SWEPT, sweep_config, sweep_values, unread_by_all
from minicache.options.train import MEMORY, TrainConfig
from minicache.screen.sweep import show_sweep

PANEL = "Swept: a value, or several separated by commas"
HELP = {
    "out": "The directory of the sweep, with a run directory for each combination, which is created or continued.",
    "ref_cache": "The reference cache, or several, as for train.",
    "loss": "Preference losses (docs/training.md lists them). A value with a colon is one mixture; repeat --loss for more: "
    "--loss sigmoid:0.8,hinge:0.2 --loss ipo,hinge.",
}
EXTRAS = {"init_from": RECIPE, "compile": in_panel(NPROC, MEMORY), "dtype": in_panel(DEVICE, MEMORY)}


def parameters() -> list[inspect.Parameter]:
    """The parameters of train, without --resume; those in SWEPT are texts, which `sweep_config` parses."""
    made = []
    for item, declared in options_of(TrainConfig):
        if item.name == "resume":
            continue
        text = HELP.get(item.name, declared.text)
        if item.name in SWEPT:
            help = text if item.default is None else f"{text} (Default: {item.default}.)"
            made.append(parameter_of(item.name, tuple[str, ...], None, Option(help=help, panel=PANEL)))
        else:
            default = None if item.default is MISSING else item.default
            needed = item.default is MISSING
            made.append(parameter_of(item.name, item.type, default, replace(declared, help=text, choices=None), needed))
        if item.name in EXTRAS:
            made.append(extra_parameter(EXTRAS[item.name]))
    made += [parameter_of("shard", str | None, None, SHARD), extra_parameter(JSON)]
    return sorted(made, key=lambda each: (each.default is not inspect.Parameter.empty, each.name != "out"))


@command_of(parameters())
def sweep(given: Given) -> None:
    """Stage two for every combination of some options, one run after another from one cache; compared in a table and a picture."""
    with errors_as_one_line("the same command goes on with the sweep"):
        defaults = recipe(given.extras["recipe"])
        config = sweep_config(single_cache(given.options), defaults)
        note(unread_by_all(config.runs, defaults.keys() - given.options.keys()))
        given.print_if_asked(TrainConfig, sweep_values(config, given.options, defaults))
        run_stage("sweep", config, given.nproc, print_json if given.json else show_sweep, given.device)
