"""A batch: what the model reads and, separately, a flat list of predictions, with the sides of pairs that each counts for.

Batches are made on the CPU by a thread that is ahead of the device. All that a step reads comes with them, in page-locked memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch

from minicache.processes.devices import has_float64


class Movable:
    """A frozen dataclass whose fields are tensors, other Movables, or plain values."""

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Self:
        """The same in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        itself: Any = self
        changed: dict[str, Any] = {}
        for item in fields(itself):
            value = getattr(self, item.name)
            if isinstance(value, Movable):
                changed[item.name] = value._each(change)
            elif isinstance(value, torch.Tensor):
                changed[item.name] = change(value)
        made: Self = replace(itself, **changed)
        return made


@dataclass(frozen=True)
class References(Movable):
    """What the losses read of the cache for B pairs with K predictions and M members.

    means: (B, 2) float32, the reference's mean logprob of chosen and rejected, nats per token. token_logps: (K,) float32, the
    reference's logprob of each prediction, nats, if the cache has them. weights: (M,) float32, with a loss that weights tokens.
    """

    means: torch.Tensor
    token_logps: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class Sequences(Movable):
    """A packed row as sequences for variable-length attention: of each pair prefix and chosen, then rejected, which reads more.

    queries, keys: (sequences + 1,) int32, the bounds of each sequence in the row, and in `gathered`.
    gathered: (keys,) positions in the row of what sequences read: for rejected, prefix and rejected.
    most_queries, most_keys: of a sequence.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    gathered: torch.Tensor
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class Batch(Movable):
    """`pairs` pairs as int64 tensors.

    input_ids: (rows, length), padded at the right with id 0.
    position_ids: (rows, length), the position of each token in its sequence; padding repeats the last.
    mask: the spans from which masks.py makes masks. With a pair per row, (rows, 3): prefix, chosen, rejected. For a packed row,
        (1, 1, pairs, 4): start, prefix, chosen, rejected of each pair. None is plain causal attention, in which padding after the
        end of a row changes nothing before it.
    as_sequences: the same for variable-length attention, of a packed row.
    boundaries: (sequences + 1,) int32, the start of each sequence in a row of sequences, and the end of the last; else None.
    sources: (K,) positions in the flattened rows whose outputs predict.
    targets: (K,) the ids that they predict.
    places: (K,) positions of the targets in the pairs' concatenated tokens.
    members, owners: (M,) index of a prediction, and the side that it counts for, 2 x pair + side, one side after another and each
        in the order of its tokens. A prediction of a shared token counts for two sides.
    counts: (2 x pairs,) the number of members of each side.
    read, readers: (S,) position in the flattened rows, and the side that reads it, for every token of every side.
    distinct: (T,) a position of every token of every pair, that of a shared token once.
    references: for a loss; None where the scores alone are asked for.
    """

    pairs: int
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor | None
    boundaries: torch.Tensor | None
    sources: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor
    members: torch.Tensor
    owners: torch.Tensor
    counts: torch.Tensor
    read: torch.Tensor
    readers: torch.Tensor
    distinct: torch.Tensor
    as_sequences: Sequences | None = None
    references: References | None = None

    def to(self, device: torch.device) -> Self:
        """The batch on a device. The spans of a packed row stay on the CPU, where reading them waits for nothing."""
        moved = super().to(device)
        return replace(moved, mask=self.mask) if self.mask is not None and self.mask.ndim == 4 else moved

    def sum_by_side(self, values: torch.Tensor) -> torch.Tensor:
        """(pairs, 2): sums over each side, as `sum_members`. values: (K,) of predictions."""
        return self.sum_members(values[self.members])

    def sum_members(self, values: torch.Tensor) -> torch.Tensor:
        """(pairs, 2): sums over each side. values: (M,) of members.

        They are float64 and in the order of tokens; on a device without float64 float32, exact but for the last rounding.
        """
        if has_float64(values.device):
            sums: torch.Tensor = torch.segment_reduce(
                values.double(), "sum", lengths=self.counts, unsafe=True, initial=0
            )
        else:
            sums = self._sums_in_float32(values)
        # a copy, because FSDP registers hooks on the outputs of a module, and a view could lose the hook
        return sums.view(-1, 2).clone()

    def _sums_in_float32(self, values: torch.Tensor) -> torch.Tensor:
        """(2 x pairs,). values: (M,)."""
        # Multiples of 2^-10: up to 16,384 nats their sums are exact in any order. What is left is too small to round much.
        coarse = (values * 1024).round() / 1024
        none = values.new_zeros(2 * self.pairs)
        return none.index_add(0, self.owners, coarse) + none.index_add(0, self.owners, values - coarse)

    @property
    def token_count(self) -> torch.Tensor:
        """(pairs, 2) float32: counted tokens of each side."""
        return self.counts.view(-1, 2).float()

    def ranks(self) -> torch.Tensor:
        """(M,) int64: the index of each member among the counted tokens of its side, from 0."""
        before = self.counts.cumsum(0) - self.counts
        return torch.arange(len(self.owners), device=self.owners.device) - before[self.owners]
