"""Text files, plain or compressed with gzip, zstd, bzip2 or xz, recognised by their first bytes."""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from pathlib import Path

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

# Most characters of a row or a text in it: four million tokens at four characters each.
MOST_ROW = 2**24
# Suffixes of compressed files.
SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz")
# What damaged or cut files raise.
ERRORS = (OSError, EOFError, zlib.error, zstd.ZstdError, lzma.LZMAError)
# Most bytes of memory for decompressing xz: its strongest setting needs a third of it.
MOST_XZ = 2**28
READ_AT_ONCE = 2**16
# Bytes that are not UTF-8 become lone surrogates, so that their line is refused and not the file.
BAD_BYTES = "surrogateescape"


def open_text(file: Path, newline: str | None = None) -> io.TextIOWrapper:
    """The decompressed text of a file; its `buffer` can peek. newline: as for `open`."""
    with file.open("rb") as stream:
        magic = stream.read(6)
    binary: io.BufferedIOBase
    if magic.startswith(b"\x1f\x8b"):
        binary = gzip.GzipFile(file)
    elif magic.startswith(b"\x28\xb5\x2f\xfd"):
        binary = zstd.ZstdFile(file)
    elif magic.startswith(b"BZh"):
        binary = bz2.BZ2File(file)
    elif magic == b"\xfd7zXZ\0":
        binary = io.BufferedReader(_Xz(file))
    else:
        binary = file.open("rb")
    return io.TextIOWrapper(binary, encoding="utf-8-sig", errors=BAD_BYTES, newline=newline)


class _Xz(io.RawIOBase):
    """The content of an xz file, decompressed in bounded memory: the file itself says how much it needs, up to 4 GB.

    `lzma.LZMAFile` has no limit.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.decoder = file.open("rb"), self._new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        while True:
            data = b""
            if self.decoder.eof:
                # Another stream may follow, after zeros.
                data = (self.decoder.unused_data or self.file.read(READ_AT_ONCE)).lstrip(b"\0")
                if not data and not (data := self.file.read(READ_AT_ONCE).lstrip(b"\0")):
                    return 0
                self.decoder = self._new()
            elif self.decoder.needs_input and not (data := self.file.read(READ_AT_ONCE)):
                raise EOFError("the file ends before its xz stream does")
            if content := self.decoder.decompress(data, len(buffer)):
                buffer[: len(content)] = content
                return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_XZ)
