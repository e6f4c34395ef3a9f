"""Reading a directory that may come from a stranger: refuses devices, pipes, and files or chunks larger than any of a cache."""

import asyncio
import stat
import sys
from pathlib import Path

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from minicache.disk import PAUSES

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# More than twice the largest chunk of the largest block that the options allow.
MOST_BYTES = 2**26
COMPRESSED = ("pairs/tokens/c/", "pairs/loss_mask/c/", "ref/token_logps/c/")


class BoundedStore(LocalStore):
    """A directory as a store of zarr, whose files appear whole. Raises ValueError: a file that no cache can contain, before it is
    read."""

    async def set(self, key: str, value: Buffer) -> None:
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
        if buffer is not None and key.startswith(COMPRESSED):
            _require_bounded_frame(buffer.to_bytes())
        return buffer


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
