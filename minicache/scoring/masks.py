"""What each layer of a model may see in a batch: spans of pairs -> attention masks.

A pair lies in its row as prefix, chosen, rejected; rejected does not see chosen. A window counts positions in the branch, so that
the first token of rejected has the last of the prefix just before it. A window that no side reaches hides nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from minicache.models.settings import setting
from minicache.scoring.batch import Batch
from minicache.scoring.kernels import Spans

# FlexAttention's default block size.
BLOCK = 128
# Kinds of layers by the names of transformers' `layer_types` -> the setting that holds the tokens that such a layer sees.
FULL, WINDOW, CHUNK = "full_attention", "sliding_attention", "chunked_attention"
# Layers that carry a state from token to token, which only boundaries in the batch can stop.
RECURRENT = ("linear_attention", "conv", "mamba", "recurrent", "hybrid")
Mask = torch.Tensor | BlockMask


@dataclass(frozen=True)
class Windows:
    """The window of each kind of attention layer, in tokens; 0: the layer sees all. recurrent: kinds of layers with a state.

    The default is a model whose attention layers all see everything.
    """

    by_kind: tuple[tuple[str, int], ...] = ((FULL, 0),)
    recurrent: tuple[str, ...] = ()

    @classmethod
    def read(cls, config: Any, longest: int) -> "Windows":
        """The windows of a model that some side of `longest` tokens reaches.

        config: the model's text configuration.

        Raises:
            ValueError: a kind of layer is not known, or a side is longer than the chunks that attention is cut into.
        """
        kinds = set(setting(config, "layer_types") or ())
        window = setting(config, "sliding_window") if getattr(config, "use_sliding_window", True) else None
        if isinstance(window, list):
            # each layer has its own; those of other kinds have none
            lengths = sorted({each for each in window if each})
            if len(lengths) > 1:
                raise ValueError(f"the model has layers with windows of {', '.join(map(str, lengths))} tokens")
            window = next(iter(lengths), None)
        if not kinds:
            kinds = {WINDOW} if window else {FULL}
        recurrent = tuple(sorted(kinds.intersection(RECURRENT)))
        reach = {FULL: 0, WINDOW: window or 0, CHUNK: setting(config, "attention_chunk_size") or 0}
        by_kind: dict[str, int] = {}
        for kind in sorted(kinds.difference(recurrent)):
            if kind not in reach or not isinstance(reach[kind], int):
                raise ValueError(f"the model has layers of {kind}")
            by_kind[kind] = reach[kind] if longest > reach[kind] else 0
        if chunk := by_kind.get(CHUNK):
            raise ValueError(f"attention is cut into chunks of {chunk} tokens, and a side has {longest}")
        return cls(tuple(by_kind.items()) or ((FULL, 0),), recurrent)

    @property
    def bite(self) -> int:
        """The smallest window that hides something; 0: none does."""
        return min((window for _, window in self.by_kind if window), default=0)


ALL_SEEN = Windows()


def masks_of(batch: Batch, windows: Windows, kernel: str) -> Mask | dict[str, Mask | None] | None:
    """The masks of a batch: one for all layers, or one for each kind of layer.

    kernel: see kernels.py. A packed row becomes a block mask for FlexAttention; for the others, its spans with the window.
    """
    if batch.mask is None:
        return None
    made = {window: _mask(batch, window, kernel) for window in {window for _, window in windows.by_kind}}
    if len(made) == 1:
        return next(iter(made.values()))
    masks: dict[str, Mask | None] = {kind: made[window] for kind, window in windows.by_kind}
    return masks | dict.fromkeys(windows.recurrent)


def _mask(batch: Batch, window: int, kernel: str) -> Mask:
    spans, length = batch.mask, batch.input_ids.shape[1]
    assert spans is not None
    if spans.ndim == 2:
        return dense_mask(spans, length, window)
    if kernel == "flex":
        return block_mask(spans.to(batch.input_ids.device, non_blocking=True)[0, 0], length, window)
    return Spans.of(spans, window, batch.as_sequences if kernel == "varlen" else None)


def dense_mask(spans: torch.Tensor, length: int, window: int = 0) -> torch.Tensor:
    """(rows, 1, length, length) bool: True where a query (third axis) sees a key.

    The mask is causal, except that rejected does not see chosen. Padding sees itself, so that no row of the mask is empty.

    spans: (rows, 3) int64, lengths of prefix, chosen, rejected. window: tokens that a query sees, itself included; 0: all.
    """
    at = torch.arange(length, device=spans.device)
    prefix, branch = spans[:, 0, None], spans[:, :2].sum(1)[:, None]  # (rows, 1)
    of_rejected, of_chosen = at >= branch, (at >= prefix) & (at < branch)  # (rows, length)
    seen = (at <= at[:, None]) & ~(of_rejected[:, None, :, None] & of_chosen[:, None, None, :])
    if window:
        position = torch.where(of_rejected, at - spans[:, 1, None], at)  # (rows, length), in the branch
        seen &= (position[:, None, :, None] - position[:, None, None, :]) < window
    return seen


def block_mask(spans: torch.Tensor, length: int, window: int = 0) -> BlockMask:
    """The mask of a packed row for FlexAttention, made without a (length, length) mask.

    A token sees two ranges of keys: those from `before` up to but not including `after`, and those from `again` to itself. For a
    token of rejected the first is the prefix, the second rejected; for the others the second is empty.

    spans: (pairs, 4) int64, start, prefix, chosen, rejected. window: tokens that a query sees, itself included; 0: all.
    """
    # (length,) each
    start, prefix, chosen, _ = spans.repeat_interleave(spans[:, 1:].sum(1), dim=0, output_size=length).T
    at = torch.arange(length, device=spans.device)
    rejected = start + prefix + chosen
    is_rejected, reach = at >= rejected, window or length
    # positions in the branch skip chosen, so the window reaches further back in the row by its length
    before = torch.maximum(start, at + 1 - reach - torch.where(is_rejected, chosen, 0))
    after = torch.where(is_rejected, start + prefix, at + 1)
    again = torch.where(is_rejected, torch.maximum(rejected, at + 1 - reach), at + 1)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen: torch.Tensor = ((key >= before[query]) & (key < after[query])) | ((key >= again[query]) & (key <= query))
        return seen

    # the first and the last key of each block, (blocks,)
    first = torch.arange(0, length, BLOCK, device=spans.device)
    last, query, low, high, anew = first + BLOCK - 1, at[:, None], before[:, None], after[:, None], again[:, None]
    # (length, blocks): whether a token sees some key of a block, and every key
    some = ((first < high) & (last >= low) & (low < high)) | ((first <= query) & (last >= anew) & (anew <= query))
    every = ((first >= low) & (last < high)) | ((first >= anew) & (last <= query))
    padding = (0, 0, 0, len(first) * BLOCK - length)
    some, every = (nn.functional.pad(seen, padding).view(len(first), BLOCK, -1) for seen in (some, every))
    whole = every.all(1)  # (blocks, blocks)
    partial = some.any(1) & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For blocks, (blocks, blocks) bool: the number of True in each row, (1, 1, blocks), and their columns first; int32.

    The second result, (1, 1, blocks, blocks), lists all columns of each row, those of the True entries first.
    """
    counts, order = blocks.sum(1), blocks.int().argsort(dim=1, descending=True, stable=True)
    return counts.int()[None, None], order.int()[None, None]


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Within this context transformers does not look for several sequences in a row that comes without a mask.

    It would read the positions on the host, and so wait for the device in every pass. Source: transformers' masking_utils.
    """
    from transformers import masking_utils

    kept, masking_utils.find_packed_sequence_indices = masking_utils.find_packed_sequence_indices, _no_sequences
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = kept


def _no_sequences(position_ids: torch.Tensor) -> None:
    """What transformers finds in rows of one sequence each."""
