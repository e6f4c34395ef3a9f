"""Which rows of the files are read: all, the first ones, or a sample that depends on the rows alone, not on their order.

What a call chose is stored for each file as text, its *bound*, so that reading the file again gives the same rows:
"first 37" rows, or those whose digest is at most "digest 03f1…".
"""

import heapq
import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice

from minicache.data.columns import Reading
from minicache.data.files import DataFile, read_rows
from minicache.errors import RowRefused

NumberedRow = tuple[int, object]
FIRST, DIGEST = "first ", "digest "


def bounds(files: list[DataFile], reading: Reading) -> list[str]:
    """The bound of each file, "" for all of its rows. A limit or a sample is of all files together.

    Raises:
        DataError: a file cannot be read.
    """
    if reading.limit is not None:
        left, found = reading.limit, []
        for file in files:
            taken = sum(1 for _ in islice(read_rows(file), left)) if left else 0
            found.append(f"{FIRST}{taken}")
            left -= taken
        return found
    if reading.sample is not None:
        digests = (digest_of(row, reading.sample_seed) for file in files for _, row in read_rows(file))
        return [f"{DIGEST}{_last_of_smallest(reading.sample, digests).hex()}"] * len(files)
    return [""] * len(files)


def _last_of_smallest(count: int, digests: Iterable[bytes]) -> bytes:
    """The largest of the `count` smallest digests; rows with equal content count once."""
    # A heap has the smallest number first: the negative of the largest digest.
    heap: list[int] = []
    kept: set[int] = set()
    for digest in digests:
        number = -int.from_bytes(digest)
        if number in kept or (len(heap) == count and number <= heap[0]):
            continue
        kept.add(number)
        heapq.heappush(heap, number)
        if len(heap) > count:
            kept.remove(heapq.heappop(heap))
    return (-heap[0]).to_bytes(16)


def within(rows: Iterable[NumberedRow], bound: str, seed: int) -> Iterator[NumberedRow]:
    """The rows of a file that its bound allows."""
    if bound.startswith(FIRST):
        yield from islice(rows, int(bound.removeprefix(FIRST)))
    elif bound:
        last = bytes.fromhex(bound.removeprefix(DIGEST))
        yield from ((line, row) for line, row in rows if digest_of(row, seed) <= last)
    else:
        yield from rows


def digest_of(row: object, seed: int) -> bytes:
    """A keyed digest of a row's content, 16 bytes: where it stands does not count."""
    if isinstance(row, RowRefused):
        row = [row.reason, str(row)]
    text = json.dumps(row, sort_keys=True, default=str)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=str(seed).encode()).digest()
