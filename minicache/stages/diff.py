"""Two reference caches side by side: identity, files, pairs, and how far apart the values of shared pairs are. No torch."""

import numpy as np

from minicache.cache.reader import ReferenceCache
from minicache.options.where import Where
from minicache.reports.difference import DiffReport, Side, compare_files, compare_values, read_values


def diff(a: Where, b: Where) -> DiffReport:
    """Compare two caches as far as they can be read; pairs are the same by their digests, wherever they lie.

    Raises:
        CacheNotFound, CacheMismatch, CacheDamaged: a manifest cannot be read.
    """
    first, second = ReferenceCache(a), ReferenceCache(b)
    mine, others = read_values(first), read_values(second)
    _, at, at_other = np.intersect1d(mine.keys, others.keys, assume_unique=True, return_indices=True)
    sides = [
        Side(str(cache.path), len(values.keys), len(values.keys) - len(at), values.unreadable)
        for cache, values in ((first, mine), (second, others))
    ]
    differences = first.identity.differences(second.identity)
    shared = compare_values(first, mine, others, at, at_other) if len(at) else None
    return DiffReport(sides[0], sides[1], differences, compare_files(first, second), shared)
