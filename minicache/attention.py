"""Attention over a packed row: many pairs, each a prefix with two branches that do not see each other.

The mask of such a row is its spans, (1, 1, pairs, 4): start, prefix, chosen, rejected of each pair. transformers hands a mask
of four dimensions on as it is, so the spans reach the function registered here, also when a checkpointed layer runs again.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

NAME = "minicache_spans"


def use_spans(model: Any) -> None:
    """Make a transformers model attend by spans where it is given them, and as before elsewhere."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)


def why_not_branching(model: Any) -> str | None:
    """What in a model's configuration forbids two branches in one row; None if nothing does, as far as it says.

    A window or a chunk counts positions in the row and not in the branch, and a recurrent layer carries chosen into rejected.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"the model has layers of {', '.join(sorted(kinds))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "the model's attention has a sliding window"
    return None


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (rows, heads, length, width) -> (rows, length, heads, width) and no weights."""
    if attention_mask is None or attention_mask.dtype == torch.bool or attention_mask.is_floating_point():
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale, grouped = options.get("scaling"), query.shape[1] != key.shape[1]
    parts = []
    for start, prefix, chosen, rejected in attention_mask[0, 0].tolist():
        branch, end = start + prefix + chosen, start + prefix + chosen + rejected
        first = slice(start, branch)
        q, k, v = (tensor[:, :, first] for tensor in (query, key, value))
        parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped))
        second = query[:, :, branch:end]
        k, v = (
            torch.cat([tensor[:, :, start : start + prefix], tensor[:, :, branch:end]], 2) for tensor in (key, value)
        )
        seen = torch.ones(rejected, prefix + rejected, dtype=torch.bool, device=query.device).tril(prefix)
        parts.append(scaled_dot_product_attention(second, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None
