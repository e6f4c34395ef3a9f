"""Offline DPO in two stages: run the frozen reference once, then train the policy alone against what it said."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicache.cache.reader import ReferenceCache
    from minicache.cache.schema import ScoredPair
    from minicache.pairs import EncodedPair

__version__ = "0.1.0"
__all__ = ["EncodedPair", "ReferenceCache", "ScoredPair"]
PLACES = {"EncodedPair": "pairs", "ReferenceCache": "cache.reader", "ScoredPair": "cache.schema"}


def __getattr__(name: str) -> Any:
    """What docs/api.md names, imported when it is first asked for: `import minicache` costs nothing."""
    if name not in PLACES:
        raise AttributeError(f"module 'minicache' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"minicache.{PLACES[name]}"), name)
