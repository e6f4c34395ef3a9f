"""Typer commands from the dataclasses that declare their options.

    @command(PrecomputeConfig, after={"tokenizer": RECIPE, "shard": NPROC})
    def precompute_ref(given: Given) -> None: ...

No command lists its options a second time.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer

from minicache.commands.extras import CONFIG, DEVICE, NPROC, PRINT_CONFIG, VERBOSE, Extra
from minicache.commands.running import errors_as_one_line, log_everything
from minicache.options.config_file import config_as_toml, options_in
from minicache.options.declare import Option, flag, options_of
from minicache.options.dictionaries import fill, flat

Config = TypeVar("Config")
# Where click found a value that the user wrote: on the command line, or in the file of --config.
WRITTEN = ("COMMANDLINE", "DEFAULT_MAP")


@dataclass(frozen=True)
class Given:
    """The values on a command line. options: those of the config that the user wrote, by name. extras: all `Extra`s, by name."""

    options: dict[str, Any]
    extras: dict[str, Any]

    def config(self, kind: type[Config], defaults: Mapping[str, Any] | None = None) -> Config:
        """The config with these options. defaults: override the config's own.

        Raises:
            ConfigError: a value is not allowed.
        """
        made = fill(kind, {**(defaults or {}), **self.options})
        self.print_if_asked(kind, flat(made))
        return made

    def print_if_asked(self, kind: type, values: Mapping[str, Any]) -> None:
        """With --print-config, print the values of a kind of config as a file, and end the command."""
        if self.extras["print_config"]:
            usual = {NPROC.name: NPROC.default, DEVICE.name: DEVICE.default}
            others = {name: self.extras[name] for name in usual if self.extras.get(name, usual[name]) != usual[name]}
            typer.echo(config_as_toml(kind, {**others, **values}), nl=False)
            raise typer.Exit

    @property
    def nproc(self) -> int:
        """Number of processes."""
        return int(self.extras["nproc"])

    @property
    def device(self) -> str:
        """Which device to compute on."""
        return str(self.extras["device"])

    @property
    def json(self) -> bool:
        """Whether to print the result as JSON."""
        return bool(self.extras["json"])


def command(
    config: type, after: Mapping[str, Extra] | None = None, optional: tuple[str, ...] = ()
) -> Callable[[Callable[[Given], None]], Callable[..., None]]:
    """A decorator that makes a function of `Given` a typer command with the options of a config.

    after: name of an option -> the extra that follows it in `--help`. optional: names of fields without a default that the user may
    leave out.
    """
    return command_of(parameters_of(config, after or {}, optional))


def command_of(parameters: list[inspect.Parameter]) -> Callable[[Callable[[Given], None]], Callable[..., None]]:
    """A decorator as `command`, with these parameters."""
    own = {each.name for each in parameters if not each.name.startswith("_")}

    def decorate(function: Callable[[Given], None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            context: typer.Context = values.pop("_context")
            if values.pop("_verbose"):
                log_everything()
            sources = {name: context.get_parameter_source(name) for name in values}
            written = {name for name, source in sources.items() if source is not None and source.name in WRITTEN}
            function(
                Given(
                    {name: value for name, value in values.items() if name in own and name in written},
                    {name.removeprefix("_"): value for name, value in values.items() if name not in own},
                )
            )

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        context = inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        added = [_config_parameter(), extra_parameter(PRINT_CONFIG), extra_parameter(VERBOSE)]
        run.__signature__ = inspect.Signature([context, *parameters, *added])  # type: ignore[attr-defined]
        return run

    return decorate


def parameters_of(config: type, after: Mapping[str, Extra], optional: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """A keyword parameter for each option of a config and each extra, required ones first."""
    parameters = []
    for item, declared in options_of(config):
        is_needed = item.default is MISSING and item.name not in optional
        default = None if item.default is MISSING else item.default
        parameters.append(parameter_of(item.name, item.type, default, declared, is_needed))
        if item.name in after:
            parameters.append(extra_parameter(after[item.name]))
    return sorted(parameters, key=lambda each: each.default is not inspect.Parameter.empty)


def parameter_of(name: str, kind: Any, default: Any, declared: Option, is_needed: bool = False) -> inspect.Parameter:
    """The parameter of an option, with a type that typer can parse; without a default if it is required."""
    read = _typed(kind)
    default = None if default == () else default
    if default is None and not is_needed and NoneType not in get_args(read):
        read = read | None
    return _parameter(
        name, read, inspect.Parameter.empty if is_needed else default, _info(name, declared, read is bool)
    )


def extra_parameter(extra: Extra) -> inspect.Parameter:
    """The parameter of an option that is no field of a config."""
    info = _info(extra.name, extra.option, extra.kind is bool)
    info.min = extra.minimum
    return _parameter(f"_{extra.name}", extra.kind, extra.default, info)


def _config_parameter() -> inspect.Parameter:
    """The parameter of --config, which is read before all others: its file may hold options that are needed."""
    made = extra_parameter(CONFIG)
    _, info = get_args(made.annotation)
    info.is_eager, info.callback = True, _read_file
    return made


def _read_file(context: typer.Context, file: Path | None) -> Path | None:
    """Take the values of a file as defaults of the command that is being parsed."""
    if file is None or context.resilient_parsing:
        return file
    parameters = [each for each in context.command.params if each.name not in (None, "_config", "_print_config")]
    known = {
        shown.lstrip("-").replace("_", "-"): str(each.name)
        for each in parameters
        for shown in (*each.opts, str(each.name))
    }
    assert context.parent
    commands = getattr(context.parent.command, "commands", {})
    with errors_as_one_line():
        values = options_in(file, str(context.info_name), commands, known)
    several = {each.name for each in parameters if getattr(each, "multiple", False) or each.nargs == -1}
    context.default_map = {
        name: [value] if name in several and not isinstance(value, list) else value for name, value in values.items()
    }
    return file


def _info(name: str, declared: Option, is_flag: bool) -> Any:
    if declared.argument:
        return typer.Argument(help=declared.text, metavar=declared.metavar)
    shown = (declared.shown or flag(name), *declared.aliases)
    return typer.Option(
        *shown, help=declared.text, metavar=None if is_flag else declared.metavar, rich_help_panel=declared.panel
    )


def _parameter(name: str, kind: Any, default: Any, info: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _typed(kind: Any) -> Any:
    """The type as which typer parses an option: text for a path or a URL, a list for several values."""
    if get_origin(kind) is tuple:
        return list[_typed(get_args(kind)[0])]  # type: ignore[misc]
    if isinstance(kind, UnionType):
        kinds = [each for each in get_args(kind) if each is not NoneType]
        several = [each for each in kinds if get_origin(each) is tuple]
        plain = _typed(several[0]) if several else str if str in kinds else kinds[0]
        return plain | None if NoneType in get_args(kind) else plain
    return Path if kind is Path else kind
