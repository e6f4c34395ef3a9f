"""The tokenizer's files that a cache holds: whether they are those of its identity, and how they travel in a table. No torch."""

import base64
import binascii
import zlib
from pathlib import Path, PurePosixPath

from minicache.cache.identity import Identity, digest_of
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import DataError, ModelError

MOST_BYTES = 2**28  # of one file: what comes from a stranger does not fill the disk


def template_digest(tokenizer: ChatTokenizer) -> str:
    """Digest of a template for an identity: of its text and the special tokens that it may name."""
    return digest_of([tokenizer.template, tokenizer.special])


def fits(directory: Path, identity: Identity) -> bool:
    """Whether the files there are those that the identity names. Raises ModelError: they cannot be read."""
    tokenizer = ChatTokenizer.load(directory)
    return (tokenizer.digest, template_digest(tokenizer)) == (identity.tokenizer, identity.template)


def pack(directory: Path) -> dict[str, str]:
    """Name -> content, compressed, as text."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {
        file.relative_to(directory).as_posix(): base64.b64encode(zlib.compress(file.read_bytes())).decode()
        for file in files
    }


def unpack(files: object, directory: Path, where: str) -> None:
    """Write the files that `pack` packed into a new directory. Raises DataError: they are not as it packs them."""
    if not isinstance(files, dict) or "tokenizer.json" not in files:
        raise DataError(f"{where}: expected the tokenizer's files in it, found none; export the cache again")
    directory.mkdir()
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or not path.name:
            raise DataError(f"{where}: a tokenizer's file has the name {name[:80]!r}; expected one below its directory")
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(_unpacked(content, f"{where}: {name[:80]!r} of the tokenizer"))


def _unpacked(content: object, where: str) -> bytes:
    try:
        inflater = zlib.decompressobj()
        data = inflater.decompress(base64.b64decode(str(content), validate=True), MOST_BYTES)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise DataError(f"{where} cannot be unpacked: {error}; export the cache again") from None
    if not inflater.eof:
        raise DataError(f"{where}: expected {MOST_BYTES:,} bytes at most, all of them; it is larger or cut off")
    return data


def require_fit(directory: Path, identity: Identity, where: str) -> None:
    """Raises DataError unless the files there are those that the identity names."""
    try:
        fitting = fits(directory, identity)
    except ModelError as error:
        raise DataError(f"{where}: its tokenizer cannot be used: {error}") from error
    if not fitting:
        raise DataError(f"{where}: its tokenizer is not the one its identity names; export the cache again")
