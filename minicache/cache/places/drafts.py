"""Making a cache as a draft beside its place, where it appears complete or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path

from minicache import disk
from minicache.cache.places.opening import claimed
from minicache.cache.places.place import Place
from minicache.errors import OutputError


@contextmanager
def drafted(out: Place, what: str) -> Iterator[tuple[Path, ExitStack]]:
    """The name of a draft, and a stack on which the block enters the draft's claim as soon as it is a cache.

    The draft is published at `out` if the block succeeds, and removed if it fails. what: the activity, such as "merging".

    Raises:
        OutputError: another process is making a cache there, or something lies there now.
    """
    _remove_leftovers(out, what)
    draft = out.home.with_name(f".{out.home.name}.{what}-{secrets.token_hex(4)}")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, draft, ignore_errors=True)
        claims = stack.enter_context(ExitStack())
        yield draft, claims
        if disk.WINDOWS:
            # where a folder with an open file cannot be renamed
            claims.close()
        out.publish(draft)


def _remove_leftovers(out: Place, what: str) -> None:
    """Remove the drafts of killed calls for this place. Raises OutputError: another process is at work on one."""
    name = escape(out.home.name)
    for leftover in [found for begun in (".", "..") for found in out.home.parent.glob(f"{begun}{name}.{what}-*")]:
        if not _is_ours(leftover):
            continue
        try:
            with claimed(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        except OutputError as error:
            raise OutputError(f"{out}: another process is {what} it; wait for its end") from error


def _is_ours(folder: Path) -> bool:
    """Whether it is of this user, who alone may remove it from a directory of temporary files that all share."""
    with suppress(OSError):
        return not hasattr(os, "getuid") or os.getuid() in (0, folder.lstat().st_uid)
    return False
