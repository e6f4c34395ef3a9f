"""Making a cache as a draft beside its place, where it appears complete or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from minicache.cache.places.place import Place
from minicache.drafts import draft_beside, is_left_over


@contextmanager
def drafted(out: Place) -> Iterator[Path]:
    """The name of a draft. It is published at `out` if the block succeeds, and removed if it fails.

    Several processes may each make one for the same place: the first to be ready is published.

    Raises:
        OutputError: something lies at `out` by then.
    """
    # those in which a killed call was about to begin its draft
    for begun in out.home.parent.glob(f"..{escape(out.home.name)}.*.draft.creating-*"):
        if is_left_over(Path(begun.name.rpartition(".creating-")[0])):
            shutil.rmtree(begun, ignore_errors=True)
    with draft_beside(out.home) as draft:
        yield draft
        out.publish(draft)
