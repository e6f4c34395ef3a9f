"""Reading a directory that may come from a stranger: refuses devices, pipes, and files or chunks larger than any of a cache."""

import asyncio
import os
import stat
import sys
from pathlib import Path

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from minicache.disk import PAUSES
from minicache.errors import CacheDamaged, OutputError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# More than twice the largest chunk of the largest block that the options allow.
MOST_BYTES = 2**26
# Of a list such as refused.jsonl, whose length has no limit of its own: more than a million lines.
MOST_IN_A_LIST = 2**28
# Of the files of a tokenizer together.
MOST_IN_A_FOLDER = 2**28
COMPRESSED = ("pairs/tokens/c/", "pairs/loss_mask/c/", "ref/token_logps/c/")


class BoundedStore(LocalStore):
    """A directory as a store of zarr, whose files appear whole. Raises ValueError: a file that no cache can contain, before it is
    read."""

    async def set(self, key: str, value: Buffer) -> None:
        self._require_inside(key)
        # as `disk.move`, which zarr does not know
        for pause in PAUSES:
            try:
                return await super().set(key, value)
            except PermissionError:
                await asyncio.sleep(pause)
        return await super().set(key, value)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        require_bounded(self.root / key)
        buffer = await super().get(key, prototype, byte_range)
        require_bounded_chunk(key, buffer)
        return buffer

    def _require_inside(self, key: str) -> None:
        """Raises OutputError: a folder of the cache is a link that leads out of it, where a stranger wants something written."""
        root = os.path.realpath(self.root)
        folder = os.path.realpath((self.root / key).parent)
        if folder != root and not folder.startswith(root + os.sep):
            raise OutputError(f"{self.root / key}: leads out of the cache, to {folder}; expected folders, no links")


def read_list(file: Path) -> bytes:
    """The content of a file whose length has no limit of its own. Raises CacheDamaged: it is larger than any list."""
    with file.open("rb") as stream:
        content = stream.read(MOST_IN_A_LIST + 1)
    if len(content) > MOST_IN_A_LIST:
        raise too_large(file, ValueError(f"{file.stat().st_size:,} bytes, expected {MOST_IN_A_LIST:,} or fewer"))
    return content


def too_large(place: object, error: ValueError) -> CacheDamaged:
    return CacheDamaged(f"{place}: cannot be used: {error}; move it away, then run the same command again")


def require_bounded_chunk(key: str, chunk: Buffer | None) -> None:
    """Raises ValueError: it is larger than any of a cache, or decompresses to more."""
    if chunk is not None and len(chunk) > MOST_BYTES:
        raise ValueError(f"{len(chunk):,} bytes, expected {MOST_BYTES:,} or fewer")
    if chunk is not None and key.startswith(COMPRESSED):
        _require_bounded_frame(chunk.to_bytes())


def require_bounded(file: Path) -> None:
    """Raises ValueError: there is something other than a file or directory, or a file larger than any of a cache."""
    try:
        info = file.stat()
    except OSError:
        # Reading the file raises a better error.
        return
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
        raise ValueError("neither a file nor a directory")
    if info.st_size > MOST_BYTES:
        raise ValueError(f"{info.st_size:,} bytes, expected {MOST_BYTES:,} or fewer")


def _require_bounded_frame(chunk: bytes) -> None:
    """Raises ValueError: the chunk decompresses to more bytes than any chunk of a cache."""
    try:
        size = zstd.get_frame_info(chunk).decompressed_size
    except zstd.ZstdError:
        # The codec raises a better error for damaged bytes.
        return
    if size is None or size > MOST_BYTES:
        raise ValueError(
            f"decompresses to {'any number of' if size is None else f'{size:,}'} bytes, expected {MOST_BYTES:,} or fewer"
        )
