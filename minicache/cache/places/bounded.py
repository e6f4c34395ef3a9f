"""Reading a directory that may come from a stranger: no device, no pipe, no file or chunk that is larger than any of a cache."""

import stat
import sys
from pathlib import Path

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MOST_BYTES = 2**26  # the largest chunk of the largest block that can be asked for has less than half of it
COMPRESSED = ("pairs/tokens/c/", "pairs/loss_mask/c/", "ref/token_logps/c/")


class BoundedStore(LocalStore):
    """A directory as a store of zarr. Raises ValueError for a file that no cache can hold, before it is in memory."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        require_bounded(self.root / key)
        buffer = await super().get(key, prototype, byte_range)
        if buffer is not None and key.startswith(COMPRESSED):
            _require_bounded_frame(buffer.to_bytes())
        return buffer


def require_bounded(file: Path) -> None:
    """Raises ValueError if something is there that is no file, or one larger than any of a cache."""
    try:
        info = file.stat()
    except OSError:
        return  # reading it raises an error that says more
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
        raise ValueError("neither a file nor a directory")
    if info.st_size > MOST_BYTES:
        raise ValueError(f"{info.st_size:,} bytes, expected {MOST_BYTES:,} or fewer")


def _require_bounded_frame(chunk: bytes) -> None:
    try:
        size = zstd.get_frame_info(chunk).decompressed_size
    except zstd.ZstdError:
        return  # damaged; the codec raises an error that says more
    if size is None or size > MOST_BYTES:
        raise ValueError(
            f"decompresses to {'any number of' if size is None else f'{size:,}'} bytes, expected {MOST_BYTES:,} or fewer"
        )
