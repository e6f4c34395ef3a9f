"""A cache that is made under another name beside its place, and appears there complete or not at all."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path

from minicache.cache.places.opening import claimed
from minicache.cache.places.place import Place
from minicache.errors import OutputError


@contextmanager
def drafted(out: Place, what: str) -> Iterator[tuple[Path, ExitStack]]:
    """The draft's name, and a stack for the claim on it, to be entered as soon as the draft is a cache.

    The draft is published at `out` when the block ends well, and gone when it does not. what: such as "merging".

    Raises:
        OutputError: another process is making one there, or something lies there by now.
    """
    _remove_leftovers(out, what)
    draft = out.home.with_name(f".{out.home.name}.{what}-{secrets.token_hex(4)}")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, draft, ignore_errors=True)
        yield draft, stack
        out.publish(draft)


def _remove_leftovers(out: Place, what: str) -> None:
    """Remove the drafts of killed calls for this place."""
    name = escape(out.home.name)
    for leftover in [found for begun in (".", "..") for found in out.home.parent.glob(f"{begun}{name}.{what}-*")]:
        try:
            with claimed(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        except OutputError as error:
            raise OutputError(f"{out}: another process is {what} it; wait for its end") from error
