"""Rotary embeddings that look at the longest sequence of a batch: dynamic NTK and LongRoPE.

Beyond the length that the model was trained for first, their frequencies follow from the length, so a pair's logprobs would depend
on its neighbours in the batch. There each sequence is a row, and its frequencies are computed as if it were alone.

Source: LongRoPE, arXiv:2402.13753; `dynamic_rope_update` in transformers' modeling_rope_utils.py.
"""

from functools import partial
from typing import Any

import torch
from torch import nn


def changes_beyond(config: Any) -> int | None:
    """The length in tokens beyond which a model's rotary frequencies depend on the length; None: they never do.

    config: the model's text configuration.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    # a model may have parameters for each kind of layer
    each = [parameters, *(item for item in parameters.values() if isinstance(item, dict))]
    moving = [item for item in each if _looks_at_length(item.get("rope_type"))]
    names = ("original_max_position_embeddings", "max_position_embeddings")
    trained = [length for name in names if (length := getattr(config, name, None))]
    return min((item.get(names[0]) or trained[0] for item in moving), default=None)


def _looks_at_length(kind: Any) -> bool:
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


def score_rows_alone(model: nn.Module) -> None:
    """Make a model's rotary embeddings compute the frequencies of each row from the positions of that row alone."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        moves = any(map(_looks_at_length, kinds.values() if isinstance(kinds, dict) else [kinds]))
        if moves and not isinstance(module.forward, partial):
            module.forward = partial(_row_by_row, module, module.forward)


def _row_by_row(
    module: Any, forward: Any, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (rows, length, width) each, as `forward` gives them. position_ids: (rows, length)."""
    rows = []
    for row in range(position_ids.shape[0]):
        # a longer sequence before this one leaves its frequencies behind
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)
        for name, original in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                module.register_buffer(name.replace("original_", ""), original.clone(), persistent=False)
        rows.append(forward(x[row : row + 1], position_ids[row : row + 1], *args, **options))
    cos, sin = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return cos, sin
