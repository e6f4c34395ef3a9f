"""Writes docs/commands.md and docs/names.md from the command line and the dicts behind it: `make commands`. Needs no torch."""

import ast
import importlib.util
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from minicache.cli import app
from minicache.data.formats import FORMATS
from minicache.options.catalog import DIVERGENCES, LAYOUTS, LOSSES, OPTIMIZERS, SCHEDULES
from minicache.options.declare import flag
from minicache.trackers import TRACKERS

PAGE = Path(__file__).with_name("commands.md")
ABOUT = """# Commands and options

Written by `make commands` from the program's own `--help`; a test keeps the two alike.
Where no default is shown, an option is off, or follows from the rest. Exit codes: 0 done; 1 an error of input, data
or an option's value, in one line; 2 a command line that cannot be parsed; 130 interrupted, with what was done saved.
"""


def reference() -> str:
    """The whole page: a section a command, a table a panel of its options."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    listed = "\n".join(f"- [{name}](#minidpo-{name}): {_line(command.help)}" for name, command in commands.items())
    return "\n".join([ABOUT, listed, "", *(_section(name, command) for name, command in commands.items())])


def _section(name: str, command: Any) -> str:
    panels = defaultdict(list)
    for parameter in command.params:
        if not parameter.hidden:
            panels[parameter.rich_help_panel or ""].append(parameter)
    arguments = [parameter.metavar or parameter.name.upper() for parameter in command.params if _is_argument(parameter)]
    required = [
        f"{parameter.opts[0]} {_value(parameter)}"
        for parameter in command.params
        if parameter.required and not _is_argument(parameter)
    ]
    usage = " ".join(["minidpo", name, *arguments, *required, "…"])
    tables = [_table(panel, parameters) for panel, parameters in panels.items()]
    return "\n".join([f"## minidpo {name}", "", _line(command.help), "", f"    {usage}", "", *tables])


def _table(panel: str, parameters: list[Any]) -> str:
    rows = [f"| {_names(each)} | {_default(each)} | {_line(each.help)} |" for each in parameters]
    title = [f"**{panel}**", ""] if panel else []
    return "\n".join([*title, "| option | default | |", "| --- | --- | --- |", *rows, ""])


def _names(parameter: Any) -> str:
    if _is_argument(parameter):
        return f"`{parameter.metavar or parameter.name.upper()}`"
    value = "" if parameter.is_flag else f" {parameter.metavar or '…'}"
    return ", ".join(f"`{name}{value}`" for name in parameter.opts)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "needed"
    return "" if parameter.default in (None, False) else f"`{parameter.default}`"


def _value(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper().replace("_", "-")


def _is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def _line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


NAMES = Path(__file__).with_name("names.md")
ABOUT_NAMES = """# Names

What options take by name, with the source of each.
Written by `make commands` from the dicts that hold the names; a test keeps the two alike.
"""


def names() -> str:
    """The whole page: a table for each kind of name."""
    tables = [
        ("Losses", "--loss", ["reads", "ln 2 at step 0", "over the batch"], _losses()),
        (
            "Divergences",
            "--f-divergence",
            ["reads"],
            ([_code(name), _reads(of), _about(of.code)] for name, of in DIVERGENCES.items()),
        ),
        (
            "Schedules",
            "--schedule",
            ["reads"],
            ([_code(name), _reads(of), _about(of.code)] for name, of in SCHEDULES.items()),
        ),
        ("Optimizers", "--optimizer", ["extra", "shards", "needs a GPU"], _optimizers()),
        ("Layouts", "--layout", [], ([_code(name), of.about] for name, of in LAYOUTS.items())),
        ("Formats of rows", "--format", ["fields"], _formats()),
        ("Trackers", "--tracker", ["extra", "if it does not start"], _trackers()),
    ]
    return "\n".join([ABOUT_NAMES, *(_names_table(*each) for each in tables)])


def _losses() -> Iterable[list[str]]:
    for name, of in LOSSES.items():
        yield [_code(name), _reads(of), _yes(of.from_ln_2), _yes(of.over_the_batch), _about(of.code)]


def _optimizers() -> Iterable[list[str]]:
    for name, of in OPTIMIZERS.items():
        yield [_code(name), _code(of.extra), _yes(of.by_name), _yes(of.gpu_only), _about(of.code)]


def _formats() -> Iterable[list[str]]:
    for name, of in FORMATS.items():
        yield [_code(name), ", ".join(map(_code, sorted(of.fields))), _first_line(of.read.__doc__)]


def _trackers() -> Iterable[list[str]]:
    for name, of in TRACKERS.items():
        yield [_code(name), _code(of.extra), of.advice, of.help]


def _names_table(title: str, option: str, columns: list[str], rows: Iterable[list[str]]) -> str:
    head = [f"`{option}`", *columns, ""]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"## {title}", "", *lines, ""])


def _about(code: str) -> str:
    """What the docstring behind "module:name" says, read from its source: importing it would take torch."""
    module, _, name = code.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return _line(ast.get_docstring(found))


def _first_line(text: str | None) -> str:
    return _line((text or "").split("\n")[0])


def _reads(entry: Any) -> str:
    return ", ".join(_code(flag(name)) for name in entry.reads)


def _code(name: str | None) -> str:
    return f"`{name}`" if name else ""


def _yes(value: bool) -> str:
    return "yes" if value else ""


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    NAMES.write_text(names(), encoding="utf-8")
