"""EncodedPairs -> tensors.

A `Batch` says what the model reads and, apart from that, a flat list of predictions: at which position, of which token, for
which side of which pair. The scorer knows no layout.
"""

from dataclasses import dataclass

import numpy as np
import torch

from minicache.pairs import EncodedPair


@dataclass(frozen=True)
class Batch:
    """`pairs` pairs as tensors.

    input_ids: (rows, length) int64, padded at the right with id 0. No attention mask: attention is causal, so padding after
        a row's end changes nothing before it.
    sources: (K,) int64, positions in the flattened rows whose output predicts.
    targets: (K,) int64, the ids they predict.
    owners: (K,) int64, 2 x pair + side.
    places: (K,) int64, where each target lies in the pairs' concatenated tokens.
    lengths: (rows,) int64, tokens of each row; what follows is padding.
    """

    pairs: int
    input_ids: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor
    places: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        move = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name != "pairs"}
        return Batch(self.pairs, **move)

    def sum_by_side(self, values: torch.Tensor) -> torch.Tensor:
        """(K,) values of predictions -> (pairs, 2), their sums over each side."""
        return values.new_zeros(2 * self.pairs).index_add(0, self.owners, values).view(-1, 2)

    def is_token(self) -> torch.Tensor:
        """(rows, length) bool, False where a row is padded."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def ranks(self) -> torch.Tensor:
        """(K,) int64: the how-manieth counted token of its side each prediction is, from 0."""
        order = self.owners.argsort(stable=True)
        counts = torch.bincount(self.owners, minlength=2 * self.pairs)
        ranks = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[self.owners[order]]
        return torch.empty_like(ranks).index_copy_(0, order, ranks)


def padded(pairs: list[EncodedPair]) -> Batch:
    """Every side a row of its own: chosen of pair 0, rejected of pair 0, chosen of pair 1, …"""
    length = max(pair.lengths[0] + max(pair.lengths[1:]) for pair in pairs)
    input_ids = np.zeros((2 * len(pairs), length), np.int64)
    sources, owners, places, lengths = [], [], [], []
    start = 0
    for index, pair in enumerate(pairs):
        prefix, chosen, _ = pair.lengths
        for side in (0, 1):
            row = 2 * index + side
            ids, mask = pair.side(side)
            input_ids[row, : len(ids)] = ids
            lengths.append(len(ids))
            counted = np.flatnonzero(mask)
            assert len(counted) == 0 or counted[0] > 0, "the first token cannot count: nothing predicts it"
            sources.append(row * length + counted - 1)
            owners.append(np.full(len(counted), row))
            places.append(start + counted + np.where(counted >= prefix, side * chosen, 0))
        start += len(pair.tokens)
    flat = np.concatenate(sources)
    tensors = (
        input_ids,
        flat,
        input_ids.ravel()[flat + 1],
        np.concatenate(owners),
        np.concatenate(places),
        np.array(lengths),
    )
    return Batch(len(pairs), *(torch.from_numpy(tensor.astype(np.int64, copy=False)) for tensor in tensors))
