"""The identity of a cache: its fields, their digest, their differences; the tolerance for rounding."""

import json
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

from minicache.errors import CacheMismatch, Difference
from minicache.options.base import QUANTIZATIONS
from minicache.options.choices import LOSS_ON, MOST_BLOCK_PAIRS, MOST_LENGTH, SPECIAL_TEXT, THINK, TRUNCATE

FORMAT_VERSION = 1
# The largest difference of a pair's mean logprob, nats per token, that rounding can cause. Batch shapes differ between the
# stages, and with them the order of sums; float32 noise is around 1e-6, that of half precisions is about their last bits.
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
    "quantization": ("", *QUANTIZATIONS),
}
# Fields that change what is stored or how; all other fields change values.
STORAGE = ("format_version", "block_pairs", "per_token")


@dataclass(frozen=True)
class Identity:
    """Everything that changes a stored value or its place. It is hashed, and never changes.

    weights: digest of the reference's weights. family: its architecture. tokenizer, template: digests. dtype: precision of the
    forward pass. block_pairs: pairs of a full block. per_token: whether each token's logprob is stored. date: that the template
    was given as today's, "" its fixed one. template_args: other values that it was given, as JSON, "" without any.
    quantization: in which the base's linear layers were held, a name in QUANTIZATIONS; "" as they are stored. `weights` is then the
    digest before quantization, which is the same on every device and in every version of the library that quantizes.

    The default of a field that was added later is the value with which earlier caches were made. Such a field is stored only if
    it has another value, so the digests of earlier caches do not change.
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
    date: str = ""
    template_args: str = ""
    quantization: str = ""

    @property
    def digest(self) -> str:
        """The digest of the stored fields, 32 hex digits."""
        return digest_of(self.stored)

    @property
    def stored(self) -> dict[str, Any]:
        """The fields as a manifest stores them."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}

    @property
    def token_dtype(self) -> str:
        return "uint16" if self.vocabulary <= 65535 else "int32"

    def require_possible(self) -> None:
        """Raises ValueError: a field has a value that no cache can have. The sizes of arrays are computed from the fields."""
        for name, allowed in POSSIBLE.items():
            if (value := getattr(self, name)) not in allowed:
                limits = f"{allowed[0]:,} to {allowed[-1]:,}" if isinstance(allowed, range) else ", ".join(allowed)
                raise ValueError(f"identity.{name}: expected {limits}, got {value!r}")

    def require(self, wanted: "Identity", problem: str, sides: tuple[str, str], advice: str) -> None:
        """Raises CacheMismatch, naming each differing field: the two identities are not equal.

        problem, advice: the beginning and the end of the message. sides: its names for this identity and for the wanted one.
        """
        if differences := self.differences(wanted):
            fields = "; ".join(
                f"{name} is {'none' if mine == '' else mine}, {sides[1]} {'none' if theirs == '' else theirs}"
                for name, mine, theirs, _ in differences
            )
            raise CacheMismatch(f"{problem}: {fields}. {advice}", differences, sides)

    def differences(self, other: "Identity") -> list[Difference]:
        """The differing fields of two identities; first those that change values."""
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
    # File names may contain any bytes, which Python represents as surrogates.
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
