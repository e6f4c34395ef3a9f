"""Pairs -> batches: the layouts that options/catalog.py names. The scorer works the same with any of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minicache.options.catalog import LAYOUTS, code_of
from minicache.pairs import PairTable
from minicache.scoring.batch import Batch, Sequences

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class _Flat:
    """The tokens of B pairs, one after another, each `prefix | chosen's rest | rejected's rest`, and what each token belongs to.

    tokens, counted: (T,) ids, and whether they count in the loss. pair: (T,) index of the pair in the batch. within: (T,) position
    in the pair's tokens. starts: (B,) start of each pair in `tokens`. prefix, chosen, rejected: (B,) lengths of the parts.
    """

    tokens: Indices
    counted: NDArray[np.bool_]
    pair: Indices
    within: Indices
    starts: Indices
    prefix: Indices
    chosen: Indices
    rejected: Indices

    @classmethod
    def of(cls, table: PairTable, indices: Indices) -> "_Flat":
        """The tokens of the pairs of a table at these indices, (B,)."""
        lengths = table.lengths[indices].astype(np.int64)  # (B, 3)
        totals = lengths.sum(1)
        starts = np.concatenate([[0], totals.cumsum()[:-1]])
        pair = np.repeat(np.arange(len(indices)), totals)
        within = np.arange(len(pair)) - starts[pair]
        selected = table.offsets[indices][pair] + within
        return cls(
            tokens=table.tokens[selected].astype(np.int64),
            counted=table.loss_mask[selected] > 0,
            pair=pair,
            within=within,
            starts=starts,
            prefix=lengths[:, 0],
            chosen=lengths[:, 1],
            rejected=lengths[:, 2],
        )

    @property
    def in_prefix(self) -> NDArray[np.bool_]:
        """(T,)"""
        return self.within < self.prefix[self.pair]

    @property
    def in_rejected(self) -> NDArray[np.bool_]:
        """(T,)"""
        return self.within >= (self.prefix + self.chosen)[self.pair]

    @property
    def positions(self) -> Indices:
        """(T,): position of each token in its own sequence; those of rejected continue after the prefix."""
        return np.where(self.in_rejected, self.within - self.chosen[self.pair], self.within)

    def sides(self, selected: NDArray[np.bool_] | slice) -> tuple[Indices, Indices]:
        """(M,) each: index among the selected tokens, and the side it belongs to; a prefix token is listed for both sides."""
        pair, shared, rejected = self.pair[selected], self.in_prefix[selected], self.in_rejected[selected]
        members = np.repeat(np.arange(len(pair)), 1 + shared)
        second = np.concatenate([[False], members[1:] == members[:-1]])
        return members, 2 * pair[members] + (rejected[members] | second)

    def members(self, members: Indices, owners: Indices) -> dict[str, Indices]:
        """The fields of `Batch` that say which predictions count for which side. members, owners: (M,), in the order of tokens."""
        order = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=2 * len(self.starts))
        return {"members": members[order], "owners": owners[order], "counts": counts}

    def batch(self, place: Indices, shape: tuple[int, int], mask: torch.Tensor | None) -> Batch:
        """The batch in which token t is at `place[t]` of the flattened rows. place: (T,). mask: see `Batch`."""
        input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        input_ids.ravel()[place] = self.tokens
        position_ids.ravel()[place] = self.positions
        counted = np.flatnonzero(self.counted)
        assert (self.positions[counted] > 0).all(), "the first token cannot count: nothing predicts it"
        # the first token of rejected's rest is predicted at the end of the prefix, which lies before chosen's rest
        opens = self.in_rejected[counted] & (self.positions[counted] == self.prefix[self.pair[counted]])
        before = np.where(opens, counted - 1 - self.chosen[self.pair[counted]], counted - 1)
        members, owners = self.sides(self.counted)
        read, readers = self.sides(slice(None))
        tensors = _tensors(
            **self.members(members, owners),
            input_ids=input_ids,
            position_ids=position_ids,
            sources=place[before],
            targets=self.tokens[counted],
            places=counted,
            read=place[read],
            readers=readers,
            distinct=place,
        )
        return Batch(pairs=len(self.starts), mask=mask, boundaries=None, **tensors)

    def by_sides(
        self, starts: Indices, position_ids: Indices, mask: torch.Tensor | None, boundaries: torch.Tensor | None
    ) -> Batch:
        """The batch in which every side is written out whole, so that a prefix is read twice.

        starts: (2B,) position of each side's first token in the flattened rows. position_ids: (rows, length). mask, boundaries:
        see `Batch`.
        """
        read, readers = self.sides(slice(None))
        place = starts[readers] + self.positions[read]
        input_ids = np.zeros(position_ids.shape, np.int64)
        input_ids.ravel()[place] = self.tokens[read]
        counted = self.counted[read]
        assert (self.positions[read][counted] > 0).all(), "the first token cannot count: nothing predicts it"
        tensors = _tensors(
            **self.members(np.arange(int(counted.sum())), readers[counted]),
            input_ids=input_ids,
            position_ids=position_ids,
            sources=place[counted] - 1,
            targets=self.tokens[read][counted],
            places=read[counted],
            read=place,
            readers=readers,
            distinct=place[np.concatenate([[True], read[1:] != read[:-1]])],
        )
        return Batch(pairs=len(self.starts), mask=mask, boundaries=boundaries, **tensors)


def _tensors(**arrays: Indices) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def padded(table: PairTable, indices: Indices) -> Batch:
    """A batch with a row for each side: chosen of the first pair, rejected of the first pair, chosen of the second, …"""
    flat = _Flat.of(table, indices)
    ends = np.stack([flat.prefix + flat.chosen, flat.prefix + flat.rejected], 1).ravel()  # (2B,)
    length = int(max(ends.max(), 1))
    position_ids = np.minimum(np.arange(length), np.maximum(ends - 1, 0)[:, None])
    return flat.by_sides(np.arange(len(ends)) * length, position_ids, None, None)


def sequences(table: PairTable, indices: Indices) -> Batch:
    """A batch with all sides one after another in one row, without padding: chosen of the first pair, rejected of the first, …

    Each side is a sequence by itself, also for a model that carries a state from token to token, if it heeds the boundaries.
    """
    flat = _Flat.of(table, indices)
    ends = np.stack([flat.prefix + flat.chosen, flat.prefix + flat.rejected], 1).ravel()  # (2B,)
    boundaries = np.concatenate([[0], ends.cumsum()])
    position_ids = np.arange(boundaries[-1]) - np.repeat(boundaries[:-1], ends)
    none = np.zeros_like(ends)
    spans = np.stack([boundaries[:-1], none, ends, none], 1)
    batch = flat.by_sides(
        boundaries[:-1], position_ids[None], _as_mask(spans), torch.from_numpy(boundaries.astype(np.int32))
    )
    return replace(batch, as_sequences=_as_sequences(spans))


def shared(table: PairTable, indices: Indices) -> Batch:
    """A batch with a row for each pair: the prefix once, then two branches, each at the positions after the prefix.

    Rejected does not see chosen.
    """
    flat = _Flat.of(table, indices)
    length = int((flat.prefix + flat.chosen + flat.rejected).max())
    spans = np.stack([flat.prefix, flat.chosen, flat.rejected], 1)
    return flat.batch(flat.pair * length + flat.within, (len(indices), length), torch.from_numpy(spans))


def packed(table: PairTable, indices: Indices) -> Batch:
    """A batch with all pairs in one row, without padding."""
    flat = _Flat.of(table, indices)
    spans = np.stack([flat.starts, flat.prefix, flat.chosen, flat.rejected], 1)
    total = len(flat.tokens)
    batch = flat.batch(np.arange(total), (1, total), _as_mask(spans))
    return replace(batch, as_sequences=_as_sequences(spans))


def _as_mask(spans: Indices) -> torch.Tensor:
    """(1, 1, pairs, 4). spans: (pairs, 4)."""
    return torch.from_numpy(spans)[None, None]


def _as_sequences(spans: Indices) -> Sequences:
    """The sequences of a packed row. spans: (pairs, 4), start, prefix, chosen, rejected."""
    start, prefix, chosen, rejected = spans.T
    branch = start + prefix + chosen
    # (2 x pairs,) each: where it starts in the row, how many of its keys are a prefix of another place, and its queries
    first = np.stack([start, branch], 1).ravel()
    apart = np.stack([np.zeros_like(prefix), prefix], 1).ravel()
    queries = np.stack([prefix + chosen, rejected], 1).ravel()
    of_pair = np.repeat(start, 2)
    first, apart, queries, of_pair = (each[queries > 0] for each in (first, apart, queries, of_pair))
    keys = apart + queries
    bounds = np.concatenate([[0], keys.cumsum()])
    within = np.arange(bounds[-1]) - np.repeat(bounds[:-1], keys)
    before = within < np.repeat(apart, keys)
    gathered = within + np.where(before, np.repeat(of_pair, keys), np.repeat(first - apart, keys))
    return Sequences(
        queries=torch.from_numpy(np.concatenate([[0], queries.cumsum()]).astype(np.int32)),
        keys=torch.from_numpy(bounds.astype(np.int32)),
        gathered=torch.from_numpy(gathered),
        most_queries=int(queries.max()),
        most_keys=int(keys.max()),
    )


def _two_rows(lengths: NDArray[np.int32]) -> Indices:
    slots: Indices = 2 * (lengths[:, 0] + lengths[:, 1:].max(1)).astype(np.int64)
    return slots


def _both_sides(lengths: NDArray[np.int32]) -> Indices:
    slots: Indices = (2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]).astype(np.int64)
    return slots


def _whole_pairs(lengths: NDArray[np.int32]) -> Indices:
    slots: Indices = lengths.sum(1, dtype=np.int64)
    return slots


@dataclass(frozen=True)
class Layout:
    """A way to lay out pairs as rows of tokens.

    make: (table, indices) -> their batch. costs: lengths of pairs, (n, 3) as in `EncodedPair` -> token slots of each, (n,).
    pads: each pair takes as many slots as the longest of its batch.
    """

    make: Callable[[PairTable, Indices], Batch]
    costs: Callable[[NDArray[np.int32]], Indices]
    pads: bool


PADDED = Layout(padded, _two_rows, pads=True)
SHARED = Layout(shared, _whole_pairs, pads=True)
PACKED = Layout(packed, _whole_pairs, pads=False)
SEQUENCES = Layout(sequences, _both_sides, pads=False)


def layout_named(name: str) -> Layout:
    """The layout with this name in LAYOUTS."""
    layout: Layout = code_of(LAYOUTS[name])
    return layout
