"""`minidpo inspect-cache`."""

import typer

from minicache.commands.assemble import Given, command
from minicache.commands.extras import DEVICE, JSON
from minicache.commands.running import err, errors_as_one_line, out, print_json, run_stage
from minicache.errors import ConfigError
from minicache.options.others import InspectConfig
from minicache.screen.inspect import show_inspection, show_pair, show_problems
from minicache.screen.live import Screen
from minicache.screen.results import show_file, show_verify


@command(InspectConfig, after={"model": DEVICE, "trust_remote_code": JSON})
def inspect_cache(given: Given) -> None:
    """Contents of a reference cache: manifest, completeness, lengths, logprobs, extremes. Needs no torch."""
    from minicache.pictures.frame import check_picture
    from minicache.stages import inspect as stage

    with errors_as_one_line():
        config = given.config(InspectConfig)
        if given.device != DEVICE.default and not config.model:
            raise ConfigError("--device: is where --model computes; expected both, got --device alone")
        if config.plot:
            check_picture(config.plot)
        if config.verify:
            _verify(config, given)
        elif config.pair is not None:
            view = stage.inspect_pair(config)
            print_json(out, view) if given.json else show_pair(out, view)
        else:
            _inspect(config, given.json)


def _inspect(config: InspectConfig, as_json: bool) -> None:
    from minicache.pictures.cache import draw_inspection
    from minicache.stages import inspect as stage

    read = stage.read_cache(config.ref_cache)
    inspection = read.inspection
    print_json(out, inspection) if as_json else show_inspection(out, inspection)
    files = err if as_json else out
    if config.plot:
        draw_inspection(inspection, config.plot)
        show_file(files, config.plot)
    if config.html:
        with Screen(err) as tracker:
            file = stage.write_cache_page(read, config.html, tracker)
        show_file(files, file)


def _verify(config: InspectConfig, given: Given) -> None:
    from minicache.stages import inspect as stage

    as_json, problems = given.json, stage.verify_cache(config)
    if not as_json:
        show_problems(out, str(config.ref_cache), problems)
    worst = None
    if config.model and not problems:
        worst = run_stage("inspect.verify_model", config, 1, None if as_json else show_verify, given.device)
    if as_json:
        print_json(out, {"problems": problems, "rescored_difference": worst})
    if problems:
        raise typer.Exit(1)
