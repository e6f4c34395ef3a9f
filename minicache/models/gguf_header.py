"""The header of a .gguf file, walked before a library reads it: what it declares must be in the file.

The gguf package makes several objects for each element that a header declares, also for those beyond the file's end, and
transformers loops over the layers. Source of the layout: ggml-org/ggml, docs/gguf.md.
"""

import mmap
import struct
from pathlib import Path

from minicache.errors import ModelError
from minicache.models.described import MOST_COUNTED, QUANTIZED_A_BYTE
from minicache.models.file_kinds import AGAIN, other_kind

MAGIC = b"GGUF"
# Type of a value -> how struct reads it.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Elements, values and tensors, about a kilobyte of memory each. A vocabulary of 262,144 with its merges has 1.3 million.
MOST = 4_000_000
# Numbers over which transformers loops, as of llama.block_count.
COUNTS = (".block_count", ".expert_count")


def require_header(path: Path) -> None:
    """Require that a file begins with a header of GGUF, and that all that it declares can be in the file.

    Raises:
        ModelError: it does not. The line says what it is, or where it ends.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(1024)
            if not head.startswith(MAGIC):
                raise ModelError(f"{path}: {other_kind(head, size) or f'not a GGUF file, or a damaged one; {AGAIN}'}")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _walk(_Header(data))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    # struct.error: a number lies beyond the file's end
    except (ValueError, struct.error) as error:
        raise ModelError(f"{path}: its header is cut off or damaged: {error}; {AGAIN}") from error


class _Header:
    """Numbers and strings, one after the other, from the version on. Raises ValueError or struct.error past the file's end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size, self.at, self.found = data, len(data), len(MAGIC), 0
        # a version is a small number: read backwards it ends in zeros
        self.order = "<" if int.from_bytes(data[4:6], "little") else ">"

    def number(self, code: str) -> int:
        form = self.order + code
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value  # type: ignore[no-any-return]

    def string(self) -> bytes:
        start = self.skip(self.number("Q"))
        return self.data[start : self.at]

    def skip(self, size: int) -> int:
        """Pass over that many bytes. Returns where they begin."""
        if size > self.size - self.at:
            raise ValueError(f"{size:,} bytes at {self.at:,}, of {self.size:,}")
        self.at += size
        return self.at - size

    def expect(self, count: int, least: int) -> None:
        """Require that the file can hold this many of something that takes at least `least` bytes."""
        self.found += count
        if count * least > self.size - self.at or self.found > MOST:
            raise ValueError(f"{count:,} entries at {self.at:,}, of {self.size:,} bytes")


def _walk(header: _Header) -> None:
    header.number("I")
    tensors, pairs = header.number("Q"), header.number("Q")
    header.expect(pairs, 13)
    header.expect(tensors, 24)
    for _ in range(pairs):
        name = header.string().decode("utf-8", "replace")
        _value(header, name, header.number("I"))
    weights = sum(_weights(header) for _ in range(tensors))
    if weights > QUANTIZED_A_BYTE * header.size:
        raise ValueError(f"tensors of {weights:,} weights, and {header.size:,} bytes")


def _value(header: _Header, name: str, kind: int) -> None:
    if kind == STRING:
        header.string()
    elif kind == ARRAY:
        _array(header, name)
    else:
        value = header.number(_code(name, kind))
        if name.endswith(COUNTS) and value > MOST_COUNTED:
            raise ValueError(f"{name} is {value:,}, expected at most {MOST_COUNTED:,}")


def _array(header: _Header, name: str) -> None:
    kind, count = header.number("I"), header.number("Q")
    if kind != STRING:
        size = struct.calcsize(header.order + _code(name, kind))
        header.expect(count, size)
        header.skip(count * size)
        return
    header.expect(count, 8)
    length, data = struct.Struct(header.order + "Q"), header.data
    # a vocabulary: this loop decides how long a file takes
    for _ in range(count):
        (size,) = length.unpack_from(data, header.at)
        header.at += 8
        header.skip(size)


def _weights(header: _Header) -> int:
    """The number of weights of the next tensor."""
    header.string()
    dimensions, weights = header.number("I"), 1
    header.expect(dimensions, 8)
    for _ in range(dimensions):
        weights *= header.number("Q")
    # its format, and where its weights begin
    header.skip(12)
    return weights


def _code(name: str, kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"{name[:80]!r} is of type {kind}")
    return SCALARS[kind]
