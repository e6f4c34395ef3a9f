"""The command line: a line a command. Heavy modules are imported by the command that needs them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from minicache import __version__
from minicache.commands.compare import compare
from minicache.commands.diff import diff
from minicache.commands.env import env
from minicache.commands.evaluate import evaluate
from minicache.commands.export import export
from minicache.commands.fit import fit
from minicache.commands.import_cache import import_cache
from minicache.commands.inspect_cache import inspect_cache
from minicache.commands.merge import merge
from minicache.commands.plot import plot
from minicache.commands.precompute_ref import precompute_ref
from minicache.commands.push import push
from minicache.commands.recipes import recipes
from minicache.commands.report import report
from minicache.commands.running import err, out
from minicache.commands.sweep import sweep
from minicache.commands.train import train
from minicache.interpreter import forget_working_directory
from minicache.processes.signals import CommandLine
from minicache.processes.streams import Outlets
from minicache.screen.results import show_error
from minicache.text import guard_output, visible

# The error of a command line, which typer takes from click or, in newer versions, from its own copy.
UsageError: Any = typer.BadParameter.__base__


class Commands(TyperGroup):
    """The commands. What an error says of an argument is shown: the name of a file may hold anything."""

    def make_context(self, *given: Any, **options: Any) -> Any:
        with _shown():
            return super().make_context(*given, **options)

    def invoke(self, ctx: Any) -> Any:
        with _shown():
            return super().invoke(ctx)


@contextmanager
def _shown() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        error.message = visible(error.message)
        raise


app = typer.Typer(
    cls=Commands,
    help="Offline DPO in two stages: run the frozen reference once, then train the policy alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("precompute-ref")(precompute_ref)
app.command("train")(train)
app.command("sweep")(sweep)
app.command("report")(report)
app.command("evaluate")(evaluate)
app.command("compare")(compare)
app.command("export")(export)
app.command("import-cache")(import_cache)
app.command("push")(push)
app.command("plot")(plot)
app.command("merge")(merge)
app.command("inspect-cache")(inspect_cache)
app.command("diff")(diff)
app.command("fit")(fit)
app.command("recipes")(recipes)
app.command("env")(env)


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


def expand_data(arguments: list[str]) -> list[str]:
    """`--data a b c`, which click does not know, as `--data a --data b --data c`."""
    expanded: list[str] = []
    in_data = fresh = False
    for argument in arguments:
        if argument.startswith("-") and argument != "-":
            in_data, fresh = argument == "--data", True
        elif in_data and not fresh:
            expanded.append("--data")
        elif in_data:
            fresh = False
        expanded.append(argument)
    return expanded


def main() -> None:
    """Run the command line of this process."""
    forget_working_directory()
    with CommandLine(), Outlets(lambda line: show_error(err, line)):
        guard_output()
        sys.argv[1:] = expand_data(sys.argv[1:])
        app(prog_name="minidpo")
