"""Attention over a packed row: many pairs, each a prefix with two branches that do not see each other.

The mask of such a row is its spans, (1, 1, pairs, 4): start, prefix, chosen, rejected of each pair. On a CPU attention walks
over the spans. A GPU would wait for each, so there they become a block mask for FlexAttention, which skips the blocks that no
token sees. transformers passes a mask of four dimensions on unchanged, so either form reaches the function registered here,
also when a checkpointed layer runs again.
"""

from functools import cache
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

NAME = "minicache_spans"
# FlexAttention's default block size.
BLOCK = 128


def use_spans(model: Any) -> None:
    """Make a transformers model attend by spans when its mask is spans, and as before otherwise."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)


def why_not_branching(model: Any) -> str | None:
    """Why a model's configuration forbids two branches in one row; None if nothing in it does.

    A window or a chunk counts positions in the row instead of the branch, and a recurrent layer carries chosen into rejected.
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
    """The mask of a batch with rows of `length` tokens, in the form that attention takes on the mask's device."""
    if not _is_spans(mask):
        return mask
    if mask.ndim == 2:
        return dense_mask(mask, length)
    return block_mask(mask[0, 0], length) if mask.is_cuda else mask


def dense_mask(spans: torch.Tensor, length: int) -> torch.Tensor:
    """(rows, 1, length, length) bool: True where a query (third axis) sees a key.

    The mask is causal, except that rejected does not see chosen. Padding sees itself, so that no row of the mask is empty.

    spans: (rows, 3) int64, lengths of prefix, chosen, rejected.
    """
    at = torch.arange(length, device=spans.device)
    prefix, branch = spans[:, 0, None], spans[:, :2].sum(1)[:, None]  # (rows, 1)
    of_rejected, of_chosen = at >= branch, (at >= prefix) & (at < branch)  # (rows, length)
    return (at <= at[:, None]) & ~(of_rejected[:, None, :, None] & of_chosen[:, None, None, :])


def block_mask(spans: torch.Tensor, length: int) -> BlockMask:
    """The mask of a packed row for FlexAttention, made without a (length, length) mask.

    A token sees its pair from the start up to itself, except for the gap: for a token of rejected, that is chosen.

    spans: (pairs, 4) int64, start, prefix, chosen, rejected.
    """
    # (length,) each
    start, prefix, chosen, _ = spans.repeat_interleave(spans[:, 1:].sum(1), dim=0, output_size=length).T
    at = torch.arange(length, device=spans.device)
    # The gap ends where rejected begins; for the tokens before that it is empty.
    resume = start + prefix + chosen
    gap = torch.where(at >= resume, start + prefix, resume)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        hidden = (key >= gap[query]) & (key < resume[query])
        seen: torch.Tensor = (key >= start[query]) & (key <= query) & ~hidden
        return seen

    # the first and the last key of each block, (blocks,)
    first = torch.arange(0, length, BLOCK, device=spans.device)
    last, query = first + BLOCK - 1, at[:, None]
    # A token sees the keys from `before` up to but not including `after`, and from `again` to itself; either range may be empty.
    before, after, again = start[:, None], torch.minimum(gap, at + 1)[:, None], resume[:, None]
    # (length, blocks): whether a token sees some key of a block, and every key
    in_first, in_second = (first < after) & (last >= before) & (before < after), (first <= query) & (last >= again)
    some = in_first | (in_second & (again <= query))
    every = ((first >= before) & (last < after)) | ((first >= again) & (last <= query))
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


@cache
def _compiled_flex() -> Any:
    # dynamic, because a packed row has another length in every batch
    return torch.compile(flex_attention, dynamic=True)


def _flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    # A compiled model compiles it too; on a CPU, in tests, the plain form is used.
    run: Any = _compiled_flex() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    output: torch.Tensor = run(query, key, value, **options)
    return output


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention output, (rows, length, heads, width), and no weights: transformers' attention interface.

    query: (rows, heads, length, width). key, value: the same with the number of key and value heads.
    attention_mask: a block mask, the spans of a packed row, (1, 1, pairs, 4) int64, or any mask that sdpa takes.
    """
    scale, grouped = options.get("scaling"), query.shape[1] != key.shape[1]
    if isinstance(attention_mask, BlockMask):
        output = _flex(query, key, value, block_mask=attention_mask, scale=scale, enable_gqa=grouped)
        return output.transpose(1, 2).contiguous(), None
    if not _is_spans(attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _attend_by_spans(query, key, value, attention_mask, scale), None


def _attend_by_spans(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """(1, length, heads, width): attention over a packed row, a pair at a time; shapes as in `attend`."""
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for start, prefix, chosen, rejected in spans[0, 0].tolist():
        branch, end = start + prefix + chosen, start + prefix + chosen + rejected
        # prefix and chosen
        first = slice(start, branch)
        q, k, v = (tensor[:, :, first] for tensor in (query, key, value))
        parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped))
        # rejected, which sees the prefix and itself
        second = query[:, :, branch:end]
        k, v = (
            torch.cat([tensor[:, :, start : start + prefix], tensor[:, :, branch:end]], 2) for tensor in (key, value)
        )
        seen = torch.ones(rejected, prefix + rejected, dtype=torch.bool, device=query.device).tril(prefix)
        parts.append(scaled_dot_product_attention(second, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped))
    return torch.cat(parts, 2).transpose(1, 2).contiguous()
