"""The tokenizer files of a cache: whether they match its identity, and their form in an exported table. No torch."""

import base64
import binascii
import zlib
from pathlib import Path, PurePosixPath

from minicache.cache.identity import Identity, digest_of
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import DataError, ModelError

# Most bytes of all files, so that a file from elsewhere does not fill the disk.
MOST_BYTES = 2**28


def template_digest(tokenizer: ChatTokenizer) -> str:
    """The digest of the template in an identity: of its text and the special tokens that it may use."""
    return digest_of([tokenizer.template, tokenizer.special])


def fits(directory: Path, identity: Identity) -> bool:
    """Whether the tokenizer files in a directory are those that the identity names.

    Raises:
        ModelError: they cannot be read.
    """
    tokenizer = ChatTokenizer.load(directory)
    return (tokenizer.digest, template_digest(tokenizer)) == (identity.tokenizer, identity.template)


def pack(directory: Path) -> dict[str, str]:
    """For each file in a directory, its name -> its content, compressed and base64-encoded."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {
        file.relative_to(directory).as_posix(): base64.b64encode(zlib.compress(file.read_bytes())).decode()
        for file in files
    }


def unpack(files: object, directory: Path, where: str) -> None:
    """Write the result of `pack` into a new directory. where: the origin of the files, for errors.

    Raises:
        DataError: `files` is not a result of `pack`.
    """
    if not isinstance(files, dict) or "tokenizer.json" not in files:
        raise DataError(f"{where}: expected the tokenizer's files, found none; export the cache again")
    directory.mkdir()
    room = MOST_BYTES
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or not path.name:
            raise DataError(f"{where}: a tokenizer's file has the name {name[:80]!r}; expected one below its directory")
        data = _unpacked(content, room, f"{where}: {name[:80]!r} of the tokenizer")
        room -= len(data)
        try:
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(data)
        # a name that is too long, or that of a folder
        except OSError as error:
            raise DataError(
                f"{where}: a tokenizer's file cannot be written: {name[:80]!r}: {error.strerror}"
            ) from error


def _unpacked(content: object, room: int, where: str) -> bytes:
    try:
        inflater = zlib.decompressobj()
        # 0 would mean any number
        data = inflater.decompress(base64.b64decode(str(content), validate=True), max(1, room))
    except (binascii.Error, ValueError, zlib.error) as error:
        raise DataError(f"{where} cannot be unpacked: {error}; export the cache again") from None
    if not inflater.eof:
        raise DataError(
            f"{where}: expected {MOST_BYTES:,} bytes at most, of all files together; it is larger or cut off"
        )
    return data


def require_fit(directory: Path, identity: Identity, where: str) -> None:
    """Require that the tokenizer files in a directory are those that the identity names. where: their origin, for errors.

    Raises:
        DataError: they are others, or cannot be read.
    """
    try:
        fitting = fits(directory, identity)
    except ModelError as error:
        raise DataError(f"{where}: its tokenizer cannot be used: {error}") from error
    if not fitting:
        raise DataError(f"{where}: its tokenizer is not the one its identity names; export the cache again")
