"""Pairs -> tensors: several ways to lay out the same tokens, which options/catalog.py names; the scorer sees none of them.

A `Batch` says what the model reads and, apart from that, a flat list of predictions: at which position, of which token, for
which sides of which pairs.
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
    """`pairs` pairs as tensors, all int64.

    input_ids: (rows, length), padded at the right with id 0.
    position_ids: (rows, length), or None where each row counts from 0.
    mask: who sees whom, as attention.py makes masks of it: (rows, 3), prefix, chosen and rejected of a pair a row;
        (1, 1, pairs, 4), start, prefix, chosen and rejected of the pairs of a packed row; or None for plain causal attention,
        in which padding after a row's end changes nothing before it.
    sources: (K,), positions in the flattened rows whose output predicts.
    targets: (K,), the ids they predict.
    places: (K,), where each target lies in the pairs' concatenated tokens.
    members, owners: (M,), which prediction counts for which side, 2 x pair + side. One of a shared token counts for two.
    read, readers: (S,), positions in the flattened rows and the side that reads them: every token of every side.
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

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """In page-locked memory, from which a copy to the GPU need not be waited for."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **changed)  # type: ignore[arg-type]

    def sum_by_side(self, values: torch.Tensor) -> torch.Tensor:
        """(K,) values of predictions -> (pairs, 2), their sums over each side."""
        return self.sum_members(values[self.members])

    def sum_members(self, values: torch.Tensor) -> torch.Tensor:
        """(M,) -> (pairs, 2). A copy, since FSDP hooks into what a module returns, and a view could lose the hook."""
        return values.new_zeros(2 * self.pairs).index_add(0, self.owners, values).view(-1, 2).clone()

    def ranks(self) -> torch.Tensor:
        """(M,): the how-manieth counted token of its side each member is, from 0."""
        order = torch.argsort(self.owners * (self.places.max() + 1) + self.places[self.members])
        counts = torch.bincount(self.owners, minlength=2 * self.pairs)
        ranks = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[self.owners[order]]
        return torch.empty_like(ranks).index_copy_(0, order, ranks)


@dataclass(frozen=True)
class _Flat:
    """Pairs one after another, `prefix | chosen's rest | rejected's rest`, and where each token belongs. Vectorised over tokens.

    tokens, counted: (T,); pair: (T,) which of the batch's pairs; within: (T,) position in the pair's tokens.
    starts: (B,) where each pair begins; prefix, chosen, rejected: (B,) lengths of the parts.
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
        lengths = table.lengths[indices].astype(np.int64)  # (B, 3)
        totals = lengths.sum(1)
        starts = np.concatenate([[0], totals.cumsum()[:-1]])
        pair = np.repeat(np.arange(len(indices)), totals)
        within = np.arange(len(pair)) - starts[pair]
        taken = table.offsets[indices][pair] + within
        return cls(table.tokens[taken].astype(np.int64), table.loss_mask[taken] > 0, pair, within, starts, *lengths.T)

    @property
    def in_prefix(self) -> NDArray[np.bool_]:
        return self.within < self.prefix[self.pair]

    @property
    def in_rejected(self) -> NDArray[np.bool_]:
        return self.within >= (self.prefix + self.chosen)[self.pair]

    @property
    def positions(self) -> Indices:
        """(T,) in the sequence a token belongs to: those of rejected go on where the prefix ends."""
        return np.where(self.in_rejected, self.within - self.chosen[self.pair], self.within)

    def sides(self, selected: NDArray[np.bool_] | slice) -> tuple[Indices, Indices]:
        """Of the selected tokens: (M,) which of them, and the side that each counts for; a prefix token is listed for both."""
        pair, both, rejected = self.pair[selected], self.in_prefix[selected], self.in_rejected[selected]
        repeats = 1 + both
        members = np.repeat(np.arange(len(pair)), repeats)
        second = np.concatenate([[False], members[1:] == members[:-1]])
        return members, 2 * pair[members] + (rejected[members] | second)

    def batch(self, place: Indices, shape: tuple[int, int], mask: torch.Tensor | None) -> Batch:
        """The batch in which token t stands at `place[t]` of the flattened rows."""
        input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        input_ids.ravel()[place] = self.tokens
        position_ids.ravel()[place] = self.positions
        counted = np.flatnonzero(self.counted)
        assert (self.positions[counted] > 0).all(), "the first token cannot count: nothing predicts it"
        opens = self.in_rejected[counted] & (self.positions[counted] == self.prefix[self.pair[counted]])
        before = np.where(opens, counted - 1 - self.chosen[self.pair[counted]], counted - 1)
        members, owners = self.sides(self.counted)
        read, readers = self.sides(slice(None))
        tensors = (place[before], self.tokens[counted], counted, members, owners, place[read], readers)
        return Batch(
            len(self.starts),
            torch.from_numpy(input_ids),
            torch.from_numpy(position_ids),
            mask,
            *(torch.from_numpy(tensor) for tensor in tensors),
        )


def padded(table: PairTable, indices: Indices) -> Batch:
    """Every side a row of its own: chosen of the first pair, rejected of the first pair, chosen of the second, …"""
    flat = _Flat.of(table, indices)
    read, readers = flat.sides(slice(None))  # a prefix token is read twice: once in each row
    shape = (2 * len(indices), int(max((flat.prefix + np.maximum(flat.chosen, flat.rejected)).max(), 1)))
    place = readers * shape[1] + flat.positions[read]
    input_ids = np.zeros(shape, np.int64)
    input_ids.ravel()[place] = flat.tokens[read]
    counted = flat.counted[read]
    assert (flat.positions[read][counted] > 0).all(), "the first token cannot count: nothing predicts it"
    count = np.arange(int(counted.sum()))
    tensors = (
        place[counted] - 1,
        flat.tokens[read][counted],
        read[counted],
        count,
        readers[counted],
        place,
        readers,
    )
    return Batch(
        len(indices), torch.from_numpy(input_ids), None, None, *(torch.from_numpy(tensor) for tensor in tensors)
    )


def shared(table: PairTable, indices: Indices) -> Batch:
    """A pair a row, its prefix once; two branches after it, positions restarting, rejected blind to chosen."""
    flat = _Flat.of(table, indices)
    length = int((flat.prefix + flat.chosen + flat.rejected).max())
    spans = np.stack([flat.prefix, flat.chosen, flat.rejected], 1)
    return flat.batch(flat.pair * length + flat.within, (len(indices), length), torch.from_numpy(spans))


def packed(table: PairTable, indices: Indices) -> Batch:
    """All pairs in one row, no padding at all. The mask is the pairs' spans: start, prefix, chosen, rejected."""
    flat = _Flat.of(table, indices)
    spans = np.stack([flat.starts, flat.prefix, flat.chosen, flat.rejected], 1)
    total = len(flat.tokens)
    return flat.batch(np.arange(total), (1, total), torch.from_numpy(spans)[None, None])


def _two_rows(lengths: NDArray[np.int32]) -> Indices:
    return 2 * (lengths[:, 0] + lengths[:, 1:].max(1)).astype(np.int64)


def _whole_pairs(lengths: NDArray[np.int32]) -> Indices:
    return lengths.sum(1, dtype=np.int64)


@dataclass(frozen=True)
class Layout:
    """make: lays out pairs of a table. costs: their lengths (n, 3), as in `EncodedPair` -> the token slots of each, (n,).

    pads: each costs as much as its batch's longest.
    """

    make: Callable[[PairTable, Indices], Batch]
    costs: Callable[[NDArray[np.int32]], Indices]
    pads: bool


PADDED = Layout(padded, _two_rows, pads=True)
SHARED = Layout(shared, _whole_pairs, pads=True)
PACKED = Layout(packed, _whole_pairs, pads=False)


def layout_named(name: str) -> Layout:
    """A layout of LAYOUTS."""
    return code_of(LAYOUTS[name])
