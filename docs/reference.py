"""Writes docs/commands.md, the command reference, from the command line itself: `make commands`. Needs no torch."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import typer

from minicache.cli import app

PAGE = Path(__file__).with_name("commands.md")
ABOUT = """# Commands and options

Written by `make commands` from the program's own `--help`; a test keeps the two alike.
Where no default is shown, an option is off, or follows from the rest. Exit codes: 0 done; 1 an error of input or data,
in one line; 2 wrong usage; 130 interrupted, with what was done saved.
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


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
