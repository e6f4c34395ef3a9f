"""What makes two requests the same cache: the fields of an identity, their digest, how far rounding may move a value."""

import json
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

from minicache.errors import CacheMismatch, Difference
from minicache.options.choices import LOSS_ON, MOST_BLOCK_PAIRS, MOST_LENGTH, SPECIAL_TEXT, THINK, TRUNCATE

FORMAT_VERSION = 1
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


@dataclass(frozen=True)
class Identity:
    """Everything that changes a stored value or where it lies. Hashed; written once.

    weights: digest of the reference's weights. family: its architecture. tokenizer, template: digests. dtype: the
    precision of the forward pass. block_pairs: pairs a block holds. per_token: whether each token's logprob is stored. A field
    that was added later has as its default the value that earlier caches were made with, and is stored only where it has
    another: so the digests of those caches do not change.
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
        """The fields as a manifest holds them."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}

    @property
    def token_dtype(self) -> str:
        return "uint16" if self.vocabulary <= 65535 else "int32"

    def require_possible(self) -> None:
        """Raises ValueError for a value that no cache can have; the sizes of arrays, among others, are computed from these."""
        for name, allowed in POSSIBLE.items():
            if (value := getattr(self, name)) not in allowed:
                limits = f"{allowed[0]:,} to {allowed[-1]:,}" if isinstance(allowed, range) else ", ".join(allowed)
                raise ValueError(f"identity.{name}: expected {limits}, got {value!r}")

    def require(self, wanted: "Identity", problem: str, sides: tuple[str, str], advice: str) -> None:
        """Raises CacheMismatch, naming each field that differs, unless the two are the same.

        problem, advice: how the message begins and ends. sides: the names in it of this identity and of the wanted one.
        """
        if differences := self.differences(wanted):
            fields = "; ".join(f"{name} is {mine}, {sides[1]} {theirs}" for name, mine, theirs, _ in differences)
            raise CacheMismatch(f"{problem}: {fields}. {advice}", differences, sides)

    def differences(self, other: "Identity") -> list[Difference]:
        """The fields in which the two differ; first those that change values."""
        values = [
            Difference(item.name, getattr(self, item.name), getattr(other, item.name), item.name not in STORAGE)
            for item in fields(self)
        ]
        return sorted(
            (each for each in values if each.found != each.expected), key=lambda each: not each.changes_values
        )


def digest_of(content: object) -> str:
    """blake2b-128 of the content's canonical JSON, as a hex string."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()  # file names may hold any bytes
