"""Attention over a packed row: many pairs, each a prefix with two branches that do not see each other.

The mask of such a row is its spans, (1, 1, pairs, 4): start, prefix, chosen, rejected of each pair. On a CPU attention walks
over them; a GPU would wait for each, so there they become the blocks that FlexAttention need not look into. transformers
hands a mask of four dimensions on as it is, so either reaches the function registered here, also when a checkpointed layer
runs again.
"""

from functools import cache
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

NAME = "minicache_spans"
BLOCK = 128  # FlexAttention's own size of a block


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


def _is_spans(mask: torch.Tensor | BlockMask | None) -> TypeGuard[torch.Tensor]:
    return isinstance(mask, torch.Tensor) and mask.dtype == torch.int64


def for_device(mask: torch.Tensor | BlockMask | None, length: int) -> torch.Tensor | BlockMask | None:
    """What attention takes on the mask's device for the mask of a batch whose rows are `length` long."""
    if not _is_spans(mask):
        return mask
    if mask.ndim == 2:
        return dense_mask(mask, length)
    return block_mask(mask[0, 0], length) if mask.is_cuda else mask


def dense_mask(spans: torch.Tensor, length: int) -> torch.Tensor:
    """spans: (rows, 3) prefix, chosen, rejected -> (rows, 1, length, length) bool, True where a query (third) sees a key.

    Causal, but for what rejected would see of chosen; padding sees itself, so that no row of the mask is empty.
    """
    at = torch.arange(length, device=spans.device)
    prefix, branch = spans[:, 0, None], spans[:, :2].sum(1)[:, None]
    of_rejected, of_chosen = at >= branch, (at >= prefix) & (at < branch)  # (rows, length)
    return (at <= at[:, None]) & ~(of_rejected[:, None, :, None] & of_chosen[:, None, None, :])


def block_mask(spans: torch.Tensor, length: int) -> BlockMask:
    """spans: (pairs, 4) -> the mask of a packed row for FlexAttention, without the (length, length) mask in between.

    A token sees its pair from the start up to itself, but for the gap: what of chosen lies before rejected.
    """
    start, prefix, chosen, _ = spans.repeat_interleave(
        spans[:, 1:].sum(1), dim=0, output_size=length
    ).T  # (length,) each
    at = torch.arange(length, device=spans.device)
    resume = start + prefix + chosen  # where rejected begins; of the tokens before it the gap is empty
    gap = torch.where(at >= resume, start + prefix, resume)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        hidden = (key >= gap[query]) & (key < resume[query])
        return (key >= start[query]) & (key <= query) & ~hidden

    first = torch.arange(0, length, BLOCK, device=spans.device)  # (blocks,) of keys
    last, query = first + BLOCK - 1, at[:, None]
    # a token sees the keys from `before` to below `after`, and from `again` to itself; either may be none
    before, after, again = start[:, None], torch.minimum(gap, at + 1)[:, None], resume[:, None]
    some = ((first < after) & (last >= before) & (before < after)) | (
        (first <= query) & (last >= again) & (again <= query)
    )  # (length, blocks)
    every = ((first >= before) & (last < after)) | ((first >= again) & (last <= query))
    padding = (0, 0, 0, len(first) * BLOCK - length)
    some, every = (nn.functional.pad(seen, padding).view(len(first), BLOCK, -1) for seen in (some, every))
    whole = every.all(1)  # (blocks, blocks)
    partial = some.any(1) & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, blocks) bool -> how many a row has, (1, 1, blocks), and which, those first, (1, 1, blocks, blocks); int32."""
    counts, order = blocks.sum(1), blocks.int().argsort(dim=1, descending=True, stable=True)
    return counts.int()[None, None], order.int()[None, None]


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)  # a packed row has another length in every batch


def _flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    # inside a compiled model it is compiled with it; on a CPU (tests) its plain form does
    run: Any = _compiled_flex() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return run(query, key, value, **options)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (rows, heads, length, width) -> (rows, length, heads, width) and no weights."""
    scale, grouped = options.get("scaling"), query.shape[1] != key.shape[1]
    if isinstance(attention_mask, BlockMask):
        given = {"block_mask": attention_mask, "scale": scale, "enable_gqa": grouped}
        return _flex(query, key, value, **given).transpose(1, 2).contiguous(), None
    if not _is_spans(attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
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
