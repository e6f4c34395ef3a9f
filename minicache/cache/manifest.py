"""What a cache says of itself: the identity, which never changes, and the log of what happened to it."""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from minicache.cache.identity import FORMAT_VERSION, Identity, digest_of
from minicache.errors import CacheDamaged, CacheMismatch
from minicache.strict import read_as

ATTRIBUTE = "minicache"


def now() -> str:
    """The current time as manifests and claims hold it: ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Source:
    """A preference file that went into the cache. `refused` counts rows by reason; `rows` = kept + duplicates + refused.

    format: as asked for. complete: whether it was read to its end; until then nothing of it is scored.
    """

    name: str
    size: int
    sha256: str
    format: str = "auto"
    rows: int = 0
    kept: int = 0
    duplicates: int = 0
    truncated: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    complete: bool = False


@dataclass
class Log:
    """What happened to the cache; changes no value. Written by one process alone.

    blocks, pairs: of the cache once every source is complete. shards: jobs of the last array, 0 without one.
    """

    model: str
    created: str
    versions: dict[str, str]
    sources: list[Source] = field(default_factory=list)
    blocks: int = 0
    pairs: int = 0
    shards: int = 0


@dataclass(frozen=True)
class Manifest:
    identity: Identity
    log: Log

    def to_attributes(self) -> dict[str, Any]:
        content = {"identity": self.identity.stored, "log": asdict(self.log)}
        return {ATTRIBUTE: {**content, "identity_digest": self.identity.digest, "digest": digest_of(content)}}

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any], where: str) -> "Manifest":
        """Raises CacheMismatch (another format version) or CacheDamaged (edited, truncated, not ours)."""
        stored = attributes.get(ATTRIBUTE)
        if not isinstance(stored, dict) or not isinstance(stored.get("identity"), dict):
            raise CacheDamaged(
                f"{where}/zarr.json: a zarr group without a minicache manifest; expected a reference cache"
            )
        version = stored["identity"].get("format_version")
        if version != FORMAT_VERSION:
            raise CacheMismatch(
                f"{where}: cache format {version}, this program reads {FORMAT_VERSION}; "
                "use the version that wrote it, or precompute again into another --ref-cache"
            )
        content = {"identity": stored["identity"], "log": stored.get("log")}
        if stored.get("digest") != digest_of(content):
            raise CacheDamaged(
                f"{where}: zarr.json was changed after it was written; its manifest does not fit its digest"
            )
        try:
            read = read_as(cls, content, "manifest")
            read.identity.require_possible()
        except TypeError as error:
            raise CacheMismatch(f"{where}: its manifest is of another version of this program: {error}") from error
        except ValueError as error:
            raise CacheDamaged(f"{where}: zarr.json is not as this program writes it: {error}") from error
        return read
