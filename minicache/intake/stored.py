"""What the blocks of pairs of a cache hold, and which of its files the missing ones came from."""

from dataclasses import dataclass

import numpy as np

from minicache.cache.blocks import Blocks
from minicache.cache.manifest import Log
from minicache.errors import CacheDamaged, CacheError


@dataclass(frozen=True)
class Stored:
    """What the blocks of pairs hold. blocks: of each sound one, digest (n, 2) and source (n, 2); holes: the others."""

    blocks: dict[int, tuple[np.ndarray, np.ndarray]]
    holes: list[int]

    @classmethod
    def read(cls, blocks: Blocks) -> "Stored":
        stored = cls({}, [])
        for block, table in blocks.each(blocks.pairs):
            if isinstance(table, CacheError):
                stored.holes.append(block)
            else:
                stored.blocks[block] = table.digest, table.source
        return stored

    def file(self, block: int) -> int:
        return int(self.blocks[block][1][0, 0])

    def places(self) -> dict[bytes, tuple[int, int]]:
        """Digest of a pair -> file and line it came from."""
        places = {}
        for digest, source in self.blocks.values():
            keys = digest.astype("<u8").tobytes()
            for index, (file, line) in enumerate(source.tolist()):
                places[keys[16 * index : 16 * index + 16]] = file, line
        return places


def sources_of_holes(blocks: Blocks, before: Log, stored: Stored, given: set[int]) -> set[int]:
    """Files that may hold a hole's pairs: from that of the sound block before it to that of the one after.

    before: the log when the call began. given: the numbers of the call's files.

    Raises:
        CacheDamaged: not all of them are given.
    """
    needed: set[int] = set()
    for hole in stored.holes:
        if hole >= before.blocks:  # of a call that was interrupted, and whose files are all given
            continue
        first = max((stored.file(block) for block in stored.blocks if block < hole), default=0)
        last = min((stored.file(block) for block in stored.blocks if block > hole), default=len(before.sources) - 1)
        needed |= {number for number in range(first, last + 1) if before.sources[number].kept}
    if absent := sorted(needed - given):
        names = ", ".join(before.sources[number].name for number in absent)
        raise CacheDamaged(
            f"{blocks.path}: pairs of block {stored.holes[0]} are missing or damaged; to go on, add to --data: {names}"
        )
    return needed
