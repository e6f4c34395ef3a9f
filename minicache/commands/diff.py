"""`minidpo diff`: two caches side by side."""

from typing import Annotated

import typer

from minicache.commands.running import Json, errors_as_one_line, out, print_json

Cache = Annotated[str, typer.Argument(metavar="CACHE", help="A reference cache, a directory or a URL.")]


def diff(a: Cache, b: Cache, as_json: Json = False) -> None:
    """What differs between two reference caches: options, files, pairs, and the values of the pairs in both. Needs no torch."""
    from minicache.screen.diff import show_diff
    from minicache.stages import diff as stage

    with errors_as_one_line():
        report = stage.diff(a, b)
        print_json(out, report) if as_json else show_diff(out, report)
