"""Making a cache as a draft beside its place, where it appears complete or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minicache.cache.places.place import Place
from minicache.drafts import draft_beside


@contextmanager
def drafted(out: Place) -> Iterator[Path]:
    """The name of a draft. It is published at `out` if the block succeeds, and removed if it fails.

    Several processes may each make one for the same place: the first to be ready is published.

    Raises:
        OutputError: something lies at `out` by then.
    """
    with draft_beside(out.home) as draft:
        yield draft
        out.publish(draft)
