"""The header of a .gguf file: what it declares is in the file, or the file is refused before a library believes it."""

import struct
from pathlib import Path

import pytest

from minicache.errors import ModelError
from minicache.models import load_model
from minicache.models.gguf_header import MOST, require_header
from tests.models.test_models import gguf_file

__all__ = ["gguf_file"]  # a fixture

TEXT, ARRAY, U8, U32, U64 = 8, 9, 0, 4, 10


def text(value: bytes, order: str = "<") -> bytes:
    return struct.pack(order + "Q", len(value)) + value


def header(*pairs: bytes, tensors: bytes = b"", count: int = 0, order: str = "<") -> bytes:
    return b"GGUF" + struct.pack(order + "IQQ", 3, count, len(pairs)) + b"".join(pairs) + tensors


def pair(name: bytes, kind: int, value: bytes, order: str = "<") -> bytes:
    return text(name, order) + struct.pack(order + "I", kind) + value


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return pair(b"a", ARRAY, struct.pack("<IQ", kind, count) + elements)


def tensor(*shape: int) -> bytes:
    return text(b"w") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0)


def blocks(name: bytes, number: int) -> bytes:
    return pair(name, U64, struct.pack("<Q", number))


WHOLE = {
    "nothing": header(),
    "values of every kind": header(*(pair(b"%d" % kind, kind, bytes(8)[:size]) for kind, size in (
        (0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 1), (8, 8), (10, 8), (11, 8), (12, 8)
    ))),
    "arrays": header(array(U8, 3, b"abc"), array(TEXT, 2, text(b"x") + text(b"")), array(U64, 0)),
    "the other order of bytes": header(pair(b"a", TEXT, text(b"x", ">"), ">"), order=">"),
    "a tensor": header(tensors=tensor(4, 4) + bytes(64), count=1),
    "many layers": header(blocks(b"llama.block_count", 10_000)),
    "a long context": header(blocks(b"llama.context_length", 10**7)),
}  # fmt: skip
BROKEN = {
    "no header": (b"GGUF", "cut off or damaged"),
    "more values than bytes": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "entries at 24, of 24 bytes"),
    "more tensors than bytes": (header(count=2**60), "entries at 24"),
    "a long name": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63) + bytes(20), "bytes at 32, of 52"),
    "a long text": (header(pair(b"a", TEXT, struct.pack("<Q", 2**63))), "9,223,372,036,854,775,808 bytes at 45, of 45"),
    "an array longer than the file": (header(array(U8, 2**40)), "1,099,511,627,776 entries at 49, of 49 bytes"),
    "an array of texts longer than the file": (header(array(TEXT, 2**40)), "1,099,511,627,776 entries"),
    "a text in an array": (header(array(TEXT, 1, struct.pack("<Q", 99))), "99 bytes at 57, of 57"),
    "an array in an array": (header(array(ARRAY, 1, bytes(12))), "'a' is of type 9"),
    "a type that there is not": (header(pair(b"a", 13, bytes(8))), "'a' is of type 13"),
    "too many elements": (header(array(U8, MOST, bytes(MOST))), "4,000,000 entries"),
    "many dimensions": (header(tensors=text(b"w") + struct.pack("<I", 2**31) + bytes(99), count=1), "2,147,483,648 entries"),
    "a tensor larger than the file": (header(tensors=tensor(2**40, 1), count=1), "1,099,511,627,776 weights, and"),
    "many blocks": (header(blocks(b"llama.block_count", 10_001)), "llama.block_count is 10,001, expected at most 10,000"),
    "many experts": (header(blocks(b"qwen3moe.expert_count", 2**40)), "qwen3moe.expert_count is 1,099,511,627,776"),
    "nothing": (b"", "an empty file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 7\n", r"a Git LFS pointer, .* \(7 bytes\)"),
    "text": (b"hello", "not a GGUF file"),
}  # fmt: skip


@pytest.mark.parametrize("what", WHOLE)
def test_a_whole_header_passes(tmp_path: Path, what: str) -> None:
    (tmp_path / "x.gguf").write_bytes(WHOLE[what])
    require_header(tmp_path / "x.gguf")


@pytest.mark.parametrize("what", BROKEN)
def test_a_header_that_declares_more_than_the_file_holds_is_one_line(tmp_path: Path, what: str) -> None:
    content, message = BROKEN[what]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(tmp_path / "x.gguf"))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{tmp_path / 'x.gguf'}: ")


def test_a_header_cut_off_anywhere_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    content = gguf_file.read_bytes()
    require_header(gguf_file)
    for length in (*range(0, 400, 7), *range(400, len(content) // 8, 997)):
        (tmp_path / "x.gguf").write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"an empty file|not a GGUF file|cut off or damaged"):
            require_header(tmp_path / "x.gguf")
