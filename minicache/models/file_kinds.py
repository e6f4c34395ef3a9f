"""What a file under a checkpoint's name is, judged by its bytes: a file of torch.save, or one of the things mistaken for it."""

import re
import zipfile
from pathlib import Path

from minicache.errors import ModelError

LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # torch.serialization.MAGIC_NUMBER as pickle writes it
LFS = b"version https://git-lfs"
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"7z\xbc\xaf": "7-Zip",
    b"Rar!": "RAR",
}
AGAIN = "copy or download it again"
SAVE = "torch.save(model.state_dict(), FILE)"


def require_torch_file(path: Path) -> bool:
    """Whether a file of torch.save is a zip archive, as since torch 1.6; False: it has the form before that.

    Raises:
        ModelError: it is none. The line says what it is and what to do.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(1024)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    if head.startswith(b"PK\x03\x04"):
        _require_torch_archive(path, size)
        return True
    if head.startswith(b"\x80") and LEGACY_MAGIC in head[:40]:
        return False
    raise ModelError(f"{path}: {_mistaken(head, size)}")


def is_path(source: str) -> bool:
    """Whether a model's name is a path, and no id of a hub: it begins as one, has several slashes, or Windows' backslashes."""
    return source.count("/") > 1 or "\\" in source or source.startswith((".", "/", "~"))


def require_file(path: Path) -> None:
    """Require that there is a file.

    Raises:
        ModelError: there is nothing, or a directory. The line says what to do.
    """
    if path.is_file():
        return
    if not path.is_dir():
        raise ModelError(f"{path}: no such file")
    if (path / ".metadata").exists():
        advice = "a sharded checkpoint of torch.distributed: python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        raise ModelError(f"{path}: {advice} {path} FILE makes one file of it")
    if (path / "config.json").exists():
        raise ModelError(
            f"{path}: a model directory under a file's name; rename it without {path.suffix} and name it again"
        )
    raise ModelError(f"{path}: a directory; expected a file that {SAVE} wrote")


def _require_torch_archive(path: Path, size: int) -> None:
    """Require a zip archive of torch.save, with the list of its members at its end."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"{path}: cut off after {size:,} bytes, or damaged: the list at the end of the archive is missing; copy or download "
            "the file again"
        ) from error
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        raise ModelError(
            f"{path}: a TorchScript archive (torch.jit.save), which holds a program; expected weights alone: {SAVE}"
        )
    if "data.pkl" not in inner:
        some = ", ".join(names[:3]) or "nothing"
        raise ModelError(
            f"{path}: a zip archive that torch.save did not write, with {some} in it; unpack it, and name the .pth inside"
        )


def other_kind(head: bytes, size: int) -> str | None:
    """What a file is that often lies in another one's place, and what to do; None for none of these.

    head: its first bytes.
    """
    if not size:
        return f"an empty file; {AGAIN}"
    if head.startswith(LFS):
        found = re.search(rb"size (\d+)", head)
        whole = f" ({int(found[1]):,} bytes)" if found else ""
        return (
            f"a Git LFS pointer, not the file itself{whole}: run git lfs pull in its repository, or download the file"
        )
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        address = "on a hub its address has /resolve/, not /blob/"
        return f"a web page, which a download saved in the file's place: download the file itself ({address})"
    if head.startswith(b"GGUF"):
        return "a GGUF file; give its name the ending .gguf"
    if not head.strip(b"\0"):
        return f"begins with zeros, as a download that was broken off does; {AGAIN}"
    return None


def _mistaken(head: bytes, size: int) -> str:
    """What a file that torch.save did not write is, and what to do."""
    if other := other_kind(head, size):
        return other
    if is_safetensors(head, size):
        return "a safetensors file; call it model.safetensors, put it beside its config.json and name that directory"
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            return f"packed with {name}; unpack it, and name the .pth inside"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it, and name the .pth inside"
    if head.startswith(b"\x80"):
        return f"a pickle that torch.save did not write, whose code is never run; expected weights alone: {SAVE}"
    if head.lstrip()[:1] in (b"{", b"[") or _is_text(head):
        line = " ".join(head[:60].decode("utf-8", "replace").split())
        return f"a text file ({line!r}); expected a file that {SAVE} wrote"
    return f"not a file that torch.save wrote, or a damaged one; expected one of {SAVE}"


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether it begins with the length of a header, which a JSON object follows."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size


def _is_text(head: bytes) -> bool:
    try:
        return head.decode("utf-8").isprintable() or not re.search(rb"[^\t\n\r\x20-\x7e]", head)
    except UnicodeDecodeError:
        return False
