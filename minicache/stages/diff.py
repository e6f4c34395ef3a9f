"""The differences between two reference caches: identity, files, pairs, and the values of shared pairs. No torch."""

import numpy as np

from minicache.cache.reader import ReferenceCache
from minicache.options.where import Where
from minicache.reports.difference import DiffReport, Side, compare_files, compare_values, read_values


def diff(a: Where, b: Where) -> DiffReport:
    """Compare two caches as far as they can be read. Pairs with the same digest are the same, wherever they lie.

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
    return DiffReport(a=sides[0], b=sides[1], identity=differences, files=compare_files(first, second), shared=shared)
