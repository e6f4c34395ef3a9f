"""Pairs -> tensors: the layouts that options/catalog.py names. The scorer works the same with any of them.

A `Batch` holds what the model reads and, separately, a flat list of predictions: the position, the predicted token, and the sides
of pairs that it counts for.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from minicache.options.catalog import LAYOUTS, code_of
from minicache.pairs import PairTable

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """`pairs` pairs as int64 tensors.

    input_ids: (rows, length), padded at the right with id 0.
    position_ids: (rows, length), or None if each row counts from 0.
    mask: the spans from which attention.py makes masks. With a pair per row, (rows, 3): prefix, chosen, rejected. For a packed row,
        (1, 1, pairs, 4): start, prefix, chosen, rejected of each pair. None is plain causal attention, in which padding after the
        end of a row changes nothing before it.
    sources: (K,) positions in the flattened rows whose outputs predict.
    targets: (K,) the ids that they predict.
    places: (K,) positions of the targets in the pairs' concatenated tokens.
    members, owners: (M,) index of a prediction, and the side that it counts for, 2 x pair + side. A prediction of a shared token
        counts for two sides.
    read, readers: (S,) position in the flattened rows, and the side that reads it, for every token of every side.
    distinct: (T,) a position of every token of every pair, that of a shared token once.
    """

    pairs: int
    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    mask: torch.Tensor | None
    sources: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor
    members: torch.Tensor
    owners: torch.Tensor
    read: torch.Tensor
    readers: torch.Tensor
    distinct: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """The batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **changed)  # type: ignore[arg-type]

    def sum_by_side(self, values: torch.Tensor) -> torch.Tensor:
        """(pairs, 2): sums over each side. values: (K,) of predictions."""
        return self.sum_members(values[self.members])

    def sum_members(self, values: torch.Tensor) -> torch.Tensor:
        """(pairs, 2): sums over each side. values: (M,) of members."""
        # a copy, because FSDP registers hooks on the outputs of a module, and a view could lose the hook
        return values.new_zeros(2 * self.pairs).index_add(0, self.owners, values).view(-1, 2).clone()

    def ranks(self) -> torch.Tensor:
        """(M,) int64: the index of each member among the counted tokens of its side, from 0."""
        order = torch.argsort(self.owners * (self.places.max() + 1) + self.places[self.members])
        counts = torch.bincount(self.owners, minlength=2 * self.pairs)
        ranks = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[self.owners[order]]
        return torch.empty_like(ranks).index_copy_(0, order, ranks)


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
            input_ids=input_ids,
            position_ids=position_ids,
            sources=place[before],
            targets=self.tokens[counted],
            places=counted,
            members=members,
            owners=owners,
            read=place[read],
            readers=readers,
            distinct=place,
        )
        return Batch(pairs=len(self.starts), mask=mask, **tensors)


def _tensors(**arrays: Indices) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def padded(table: PairTable, indices: Indices) -> Batch:
    """A batch with a row for each side: chosen of the first pair, rejected of the first pair, chosen of the second, …"""
    flat = _Flat.of(table, indices)
    # a prefix token is read twice, once in each row
    read, readers = flat.sides(slice(None))
    shape = (2 * len(indices), int(max((flat.prefix + np.maximum(flat.chosen, flat.rejected)).max(), 1)))
    place = readers * shape[1] + flat.positions[read]
    input_ids = np.zeros(shape, np.int64)
    input_ids.ravel()[place] = flat.tokens[read]
    counted = flat.counted[read]
    assert (flat.positions[read][counted] > 0).all(), "the first token cannot count: nothing predicts it"
    tensors = _tensors(
        input_ids=input_ids,
        sources=place[counted] - 1,
        targets=flat.tokens[read][counted],
        places=read[counted],
        members=np.arange(int(counted.sum())),
        owners=readers[counted],
        read=place,
        readers=readers,
        distinct=place[np.concatenate([[True], read[1:] != read[:-1]])],
    )
    return Batch(pairs=len(indices), position_ids=None, mask=None, **tensors)


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
    return flat.batch(np.arange(total), (1, total), torch.from_numpy(spans)[None, None])


def _two_rows(lengths: NDArray[np.int32]) -> Indices:
    slots: Indices = 2 * (lengths[:, 0] + lengths[:, 1:].max(1)).astype(np.int64)
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


def layout_named(name: str) -> Layout:
    """The layout with this name in LAYOUTS."""
    layout: Layout = code_of(LAYOUTS[name])
    return layout
