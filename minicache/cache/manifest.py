"""The manifest of a cache: its identity, which never changes, and the log of what happened to it."""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from minicache.cache.identity import FORMAT_VERSION, Identity, digest_of
from minicache.errors import CacheDamaged, CacheMismatch
from minicache.options.choices import MOST_BLOCK_PAIRS
from minicache.strict import read_as

ATTRIBUTE = "minicache"
# The most blocks of a cache: damaged or hostile metadata with more would keep readers counting for ever.
MOST_BLOCKS = 2**24


def now() -> str:
    """The current time as manifests and claims store it: ISO 8601, UTC, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Source:
    """A preference file of the cache. `refused` counts rows by reason; `rows` = kept + duplicates + refused.

    format: as asked for. complete: whether it was read to its end; until then none of its pairs is scored. reading: the other
    options that say how rows become pairs, by name. unused: rows by the name of a column or key that nothing reads. noted: rows
    by kind of note. example: a row whose content holds the text of a special token, and that text. chosen: which rows were read,
    as `data.sampling` says it; "" for all.
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
    reading: dict[str, str] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    example: str = ""
    chosen: str = ""

    @property
    def options(self) -> dict[str, str]:
        """The options by which rows became pairs: those of a newer release are there as they are, not understood."""
        return {"format": self.format, **self.reading}

    @property
    def stored(self) -> dict[str, Any]:
        """The fields as a manifest stores them: those of later versions only where they say something."""
        return {name: value for name, value in asdict(self).items() if value or name not in LATER}


# Fields of a source that 0.1.0 did not have.
LATER = ("reading", "unused", "noted", "example", "chosen")


@dataclass
class Log:
    """The log of a cache, which changes no value. Only one process writes it.

    blocks, pairs: numbers of the cache once every source is complete. shards: jobs of the last array of jobs, 0 without one.
    """

    model: str
    created: str
    versions: dict[str, str]
    sources: list[Source] = field(default_factory=list)
    blocks: int = 0
    pairs: int = 0
    shards: int = 0

    def require_possible(self) -> None:
        """Raises ValueError: a number is larger than that of any cache. Readers count up to them."""
        for name, most in (("blocks", MOST_BLOCKS), ("shards", MOST_BLOCKS), ("pairs", MOST_BLOCKS * MOST_BLOCK_PAIRS)):
            if (value := getattr(self, name)) > most:
                raise ValueError(f"log.{name}: expected {most:,} or fewer, got {value}")


@dataclass(frozen=True)
class Manifest:
    """Identity and log, as the attributes of the cache's zarr group store them."""

    identity: Identity
    log: Log

    def to_attributes(self) -> dict[str, Any]:
        """The attributes of the zarr group, with digests."""
        log = {**asdict(self.log), "sources": [source.stored for source in self.log.sources]}
        content = {"identity": self.identity.stored, "log": log}
        return {ATTRIBUTE: {**content, "identity_digest": self.identity.digest, "digest": digest_of(content)}}

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any], where: str) -> "Manifest":
        """The manifest in a group's attributes. Raises CacheMismatch (another format version), CacheDamaged (changed, not ours)."""
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
            read: Manifest = read_as(cls, content, "manifest")
            read.identity.require_possible()
            read.log.require_possible()
        except TypeError as error:
            raise CacheMismatch(f"{where}: its manifest is of another version of this program: {error}") from error
        except ValueError as error:
            raise CacheDamaged(f"{where}: zarr.json is not as this program writes it: {error}") from error
        return read
