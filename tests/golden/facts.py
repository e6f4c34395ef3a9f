"""What a cache holds, read by the names that last: `minicache.ReferenceCache` and the arrays of docs/cache-format.md."""

from pathlib import Path
from typing import Any

import zarr

from minicache import ReferenceCache


def facts_of(cache: Path) -> dict[str, Any]:
    """Identity, ledgers, and of each pair where it came from and its values."""
    opened = ReferenceCache.open(str(cache))
    return {
        "identity": opened.identity.digest,
        "weights": opened.identity.weights,
        "ledger": ledger_of(cache),
        "pairs": [
            {
                "digest": scored.pair.digest.hex(),
                "from": [scored.file, scored.line],
                "token_count": [int(count) for count in scored.token_count],
                "logp_mean": [float(mean) for mean in scored.logp_mean],
            }
            for scored in opened
        ],
    }


def ledger_of(cache: Path) -> dict[str, list[list[int]]]:
    """Rows of both ledgers: identity, pairs, tokens, counted, digest of each block."""
    root = zarr.open_group(cache, mode="r")
    return {name: root[f"ledger/{name}"][:].tolist() for name in ("pairs", "ref")}  # type: ignore[index, union-attr]
