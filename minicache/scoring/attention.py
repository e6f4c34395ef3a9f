"""Attention over rows that hold pairs, for models whose code asks transformers' registry; kernels.py computes it.

The mask says how. Soft caps (Gemma 2) and sinks (gpt-oss) are computed; what else a model's code passes that would change values is
refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from minicache.scoring.kernels import Form, Mask, Spans, attended

NAME = "minicache_spans"
_watched: list[list["Call"]] = []


class Call(NamedTuple):
    """A call of `attend`: its mask and form, and the shape and precision of query, key and value."""

    mask: Mask
    form: Form
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


def use_spans(model: Any) -> None:
    """Make a transformers model attend with `attend`, if its code asks the registry; each batch then needs a mask of its own."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    set_attention(model, NAME)


def set_attention(model: Any, name: str) -> None:
    """Set a model's attention implementation, unless its code has but one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base._can_set_attn_implementation():
        base.set_attn_implementation(name)


@contextmanager
def watching() -> Iterator[list[Call]]:
    """The calls of `attend` within this context."""
    _watched.append([])
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention output, (rows, length, heads, width), and no weights: transformers' attention interface.

    query: (rows, heads, length, width). key, value: the same with the number of key and value heads.
    attention_mask: see `attended`. scaling, softcap, s_aux: see `Form`.

    Raises:
        ValueError: the model passes a bias, or a mask of another kind.
    """
    if options.get("position_bias") is not None:
        raise ValueError("its attention adds a bias to the scores")
    form, given = Form(scaling, softcap, s_aux), (query, key, value)
    for calls in _watched:
        # a model of shards frees its parameters after the pass
        seen = form._replace(sinks=None if s_aux is None else s_aux.detach().clone())
        calls.append(
            Call(attention_mask, seen, tuple(tuple(each.shape) for each in given), tuple(each.dtype for each in given))
        )
    known = attention_mask is None or isinstance(attention_mask, BlockMask | Spans)
    if not known and attention_mask.dtype != torch.bool:  # type: ignore[union-attr]
        raise ValueError("its code made an attention mask of its own")
    return attended(*given, attention_mask, form).transpose(1, 2).contiguous(), None
