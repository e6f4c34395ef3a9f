"""The cache on disk: array names, dtypes, chunking; the manifest; what makes two requests the same cache.

One zarr-3 group. A *block* is a row of every array and the unit of work, of writing and of resuming; every chunk belongs to
one block. The second axis of the token arrays is a virtual capacity: chunks never written do not exist.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minicache.errors import CacheDamaged, CacheMismatch, Difference
from minicache.options.choices import LOSS_ON, MOST_BLOCK_PAIRS, MOST_LENGTH, SPECIAL_TEXT, THINK, TRUNCATE
from minicache.pairs import PairTable
from minicache.strict import read_as

FORMAT_VERSION = 1
MAX_CHUNK = 2**20
LEDGER_COLUMNS = ("identity", "pairs", "tokens", "counted", "digest")
ATTRIBUTE = "minicache"
# Largest difference of a pair's mean logprob, nats a token, that rounding explains. Batch shapes differ between the stages, and
# with them the order of sums; float32 noise is around 1e-6, that of half precisions is of the size of their last bits.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
POSSIBLE: dict[str, range | tuple[str, ...]] = {
    "vocabulary": range(1, 2**31),
    "max_length": range(2, MOST_LENGTH + 1),
    "block_pairs": range(1, MOST_BLOCK_PAIRS + 1),
    "truncate": TRUNCATE,
    "loss_on": LOSS_ON,
    "think": THINK,
    "special_text": SPECIAL_TEXT,
    "dtype": tuple(TOLERANCE),
}
# Fields of an identity that say how or what is stored; the others change values.
STORAGE = ("format_version", "block_pairs", "per_token")


def now() -> str:
    """The moment, as manifests and claims hold it: ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Identity:
    """Everything that changes a stored value or where it lies. Hashed; written once.

    weights: digest of the reference's weights. family: its architecture. tokenizer, template: digests. dtype: the
    precision of the forward pass. block_pairs: pairs a block holds. per_token: whether each token's logprob is stored. A field
    added since the format's first caches has the value that those were made with as its default, and is stored only if it
    has another: so they stay what they are.
    """

    format_version: int
    weights: str
    family: str
    tokenizer: str
    template: str
    vocabulary: int
    max_length: int
    truncate: str
    loss_on: str
    think: str
    dtype: str
    attention: str
    block_pairs: int
    per_token: bool
    special_text: str = "allow"

    @property
    def digest(self) -> str:
        return digest_of(self.stored)

    @property
    def stored(self) -> dict[str, Any]:
        """As a manifest holds it."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}

    @property
    def token_dtype(self) -> str:
        return "uint16" if self.vocabulary <= 65535 else "int32"

    def require_possible(self) -> None:
        """Raises ValueError where no cache can be so: what follows relies on it, the sizes of its arrays among them."""
        for name, allowed in POSSIBLE.items():
            if (value := getattr(self, name)) not in allowed:
                limits = f"{allowed[0]:,} to {allowed[-1]:,}" if isinstance(allowed, range) else ", ".join(allowed)
                raise ValueError(f"identity.{name}: expected {limits}, got {value!r}")

    def require(self, wanted: "Identity", problem: str, sides: tuple[str, str], advice: str) -> None:
        """Raises CacheMismatch, naming each field that differs, unless the two are the same.

        problem, advice: what the message begins and ends with. sides: what this identity and the wanted one are called.
        """
        if differences := self.differences(wanted):
            fields = "; ".join(f"{name} is {mine}, {sides[1]} {theirs}" for name, mine, theirs, _ in differences)
            raise CacheMismatch(f"{problem}: {fields}. {advice}", differences, sides)

    def differences(self, other: "Identity") -> list[Difference]:
        """Each field in which the two differ, those first that change values."""
        values = [
            Difference(item.name, getattr(self, item.name), getattr(other, item.name), item.name not in STORAGE)
            for item in fields(self)
        ]
        return sorted(
            (each for each in values if each.found != each.expected), key=lambda each: not each.changes_values
        )


@dataclass
class Source:
    """A preference file that went into the cache. `refused` counts rows by reason; `rows` = kept + duplicates + refused.

    format: as asked for. complete: read to its end; until then nothing of it is scored.
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

    blocks, pairs: how many the cache holds once every source is complete. shards: jobs of the last array, 0 without one.
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


@dataclass(frozen=True)
class ArraySpec:
    """shape[0] is the number of blocks; a chunk is one block's `chunk` entries along the second axis."""

    shape: tuple[int, ...]
    dtype: str
    chunk: int
    fill: Any
    compress: bool = False

    @property
    def chunks(self) -> tuple[int, ...]:
        return (1, self.chunk, *self.shape[1:])


def array_specs(identity: Identity) -> dict[str, ArraySpec]:
    """Every array of a cache; `shape` without the leading axis of blocks."""
    block = identity.block_pairs
    most = block * 2 * identity.max_length
    chunk = min(MAX_CHUNK, 1 << (most - 1).bit_length())
    capacity = -(-most // chunk) * chunk
    token_fill = 65535 if identity.token_dtype == "uint16" else -1
    specs = {
        "pairs/tokens": ArraySpec((capacity,), identity.token_dtype, chunk, token_fill, compress=True),
        "pairs/loss_mask": ArraySpec((capacity,), "uint8", chunk, 255, compress=True),
        "pairs/lengths": ArraySpec((block, 3), "int32", block, -1),
        "pairs/digest": ArraySpec((block, 2), "uint64", block, 2**64 - 1),
        "pairs/source": ArraySpec((block, 2), "int64", block, -1),
        "ref/logp_mean": ArraySpec((block, 2), "float32", block, float("nan")),
        "ref/token_count": ArraySpec((block, 2), "int32", block, -1),
        "ledger/pairs": ArraySpec((len(LEDGER_COLUMNS),), "int64", len(LEDGER_COLUMNS), -1),
        "ledger/ref": ArraySpec((len(LEDGER_COLUMNS),), "int64", len(LEDGER_COLUMNS), -1),
    }
    if identity.per_token:
        specs["ref/token_logps"] = ArraySpec((capacity,), "float32", chunk, float("nan"), compress=True)
    return specs


@dataclass(frozen=True)
class RefBlock:
    """What the reference thinks of some pairs.

    logp_mean: (N, 2) float32, masked mean logprob of chosen and rejected, nats a token. token_count: (N, 2) int32.
    token_logps: (T,) float32, NaN where a token does not count; None if the cache does not keep them.
    """

    logp_mean: np.ndarray
    token_count: np.ndarray
    token_logps: np.ndarray | None = None


class CachedPairs(NamedTuple):
    """Pairs and, pair by pair, what the reference thinks of them."""

    table: PairTable
    reference: RefBlock

    def token_logps(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Each stored token's logprob, of these pairs one after another; NaN where it does not count. Needs --per-token."""
        assert self.reference.token_logps is not None
        offsets = self.table.offsets
        return np.concatenate([self.reference.token_logps[offsets[i] : offsets[i + 1]] for i in indices])


def pairs_row(identity: Identity, table: PairTable) -> np.ndarray:
    """(5,) int64: the ledger's row for a block of pairs."""
    data = (table.tokens, table.loss_mask, table.lengths, table.digest, table.source)
    return _row(identity, len(table), len(table.tokens), int(table.loss_mask.sum()), data)


def ref_row(identity: Identity, block: RefBlock, pairs: np.ndarray) -> np.ndarray:
    """(5,) int64: the ledger's row for a scored block; `pairs`, the row of the pairs it scored, is part of its digest."""
    data = [pairs.astype("<i8"), block.logp_mean, block.token_count]
    if identity.per_token and block.token_logps is not None:
        data.append(block.token_logps)
    return _row(identity, len(block.logp_mean), int(pairs[2]), int(block.token_count.sum()), data)


def _row(identity: Identity, pairs: int, tokens: int, counted: int, data: Iterable[np.ndarray]) -> np.ndarray:
    state = blake2b(digest_size=8)
    for array in data:
        state.update(np.ascontiguousarray(array).data)
    digest = int.from_bytes(state.digest(), "little", signed=True)
    return np.array([identity_number(identity), pairs, tokens, counted, digest], np.int64)


def identity_number(identity: Identity) -> int:
    """What a ledger row says of the identity: the first 60 bits of its digest."""
    return int(identity.digest[:15], 16)


def digest_of(content: object) -> str:
    """blake2b-128 of the content's canonical JSON, as a hex string."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()  # file names may hold any bytes
