"""Attention over rows that hold pairs, each a prefix with two branches that do not see each other.

Registered with transformers under NAME, for models whose code asks its registry. The mask says how: the spans of a packed row,
over which attention walks where nothing is compiled, a block mask (FlexAttention skips the blocks that no token sees), or a dense
mask. Soft caps (Gemma 2) and sinks (gpt-oss) are computed; what else a model's code passes that would change values is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from minicache.processes.devices import has_flex

NAME = "minicache_spans"
Mask = torch.Tensor | BlockMask | None
_watched: list[list[Mask]] = []
_as_fused: list[bool] = []


class Form(NamedTuple):
    """What a model does to the scores of its attention.

    scale: None is 1 / sqrt(width). cap: scores are cap * tanh(score / cap). sinks: (heads,) the score of a key without a value.
    """

    scale: float | None = None
    cap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention computes it."""
        return self.cap is None and self.sinks is None


class Spans(torch.Tensor):
    """The spans of a packed row, (1, 1, pairs, 5) int64: start, prefix, chosen, rejected, window (0: none), as a mask.

    transformers passes a mask of four dimensions on unchanged. A model whose code calls torch's own attention with it (Falcon)
    gets attention by spans, too.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return _attend_as_torch(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


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
def watching() -> Iterator[list[Mask]]:
    """The masks that `attend` gets within this context, one for each call."""
    _watched.append([])
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


@contextmanager
def as_if_fused() -> Iterator[None]:
    """Within this every form of attention makes tensors of the sizes that a fused kernel makes; what they hold is another thing."""
    _as_fused.append(True)
    try:
        yield
    finally:
        _as_fused.pop()


@cache
def _compiled_flex() -> Any:
    # dynamic, because a packed row has another length in every batch
    return torch.compile(flex_attention, dynamic=True)


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
    attention_mask: a block mask, the spans of a packed row, or (rows, 1, length, length) bool, True where a query sees a key.
        None: plain causal attention.
    scaling, softcap, s_aux: see `Form`.

    Raises:
        ValueError: the model passes a bias, or a mask of another kind.
    """
    if options.get("position_bias") is not None:
        raise ValueError("its attention adds a bias to the scores")
    form = Form(scaling, softcap, s_aux)
    for masks in _watched:
        masks.append(attention_mask)
    if isinstance(attention_mask, BlockMask):
        output = _flex(query, key, value, attention_mask, form)
    elif isinstance(attention_mask, Spans):
        output = _by_spans(query, key, value, attention_mask, form)
    elif attention_mask is None or attention_mask.dtype == torch.bool:
        output = _masked(query, key, value, attention_mask, form)
    else:
        raise ValueError("its code made an attention mask of its own")
    return output.transpose(1, 2).contiguous(), None


def _attend_as_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As torch's scaled_dot_product_attention with spans as its mask."""
    assert isinstance(attn_mask, Spans), "spans are passed as the mask"
    if dropout_p or is_causal:
        raise ValueError("its attention has dropout, or a causal mask beside the one given")
    return _by_spans(query, key, value, attn_mask, Form(scale))


def _by_spans(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    form: Form,
) -> torch.Tensor:
    """(1, heads, length, width): attention over a packed row, a pair at a time; shapes as in `attend`."""
    if query.shape[0] != 1:
        raise ValueError("its attention changes the number of rows")
    parts = []
    for start, prefix, chosen, rejected, window in spans.tolist()[0][0]:
        branch, end = start + prefix + chosen, start + prefix + chosen + rejected
        # prefix and chosen
        q, k, v = (tensor[:, :, start:branch] for tensor in (query, key, value))
        parts.append(_masked(q, k, v, _causal(prefix + chosen, 0, window, query.device), form))
        if not rejected:
            continue
        # rejected, which sees the prefix and itself
        k, v = (
            torch.cat([tensor[:, :, start : start + prefix], tensor[:, :, branch:end]], 2) for tensor in (key, value)
        )
        parts.append(_masked(query[:, :, branch:end], k, v, _causal(rejected, prefix, window, query.device), form))
    return torch.cat(parts, 2)


def _causal(queries: int, before: int, window: int, device: torch.device) -> torch.Tensor | None:
    """(queries, before + queries) bool: True where a query sees a key. None: plain causal attention, which needs no mask.

    before: keys before the first query's own. window: keys that a query sees, its own included; 0: all.
    """
    keys = before + queries
    bites = 0 < window < keys
    if not (before or bites):
        return None
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
    return seen.triu(before - window + 1) if bites else seen


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    form: Form,
) -> torch.Tensor:
    """(rows, heads, queries, width): attention under a mask, (…, queries, keys) bool, or None: causal. Shapes as in `attend`."""
    groups = query.shape[1] // key.shape[1]
    if form.is_plain or _as_fused:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=form.scale, enable_gqa=groups > 1
        )
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = (
        query @ key.mT * (query.shape[-1] ** -0.5 if form.scale is None else form.scale)
    )  # (rows, heads, queries, keys)
    if form.cap is not None:
        scores = _capped(form.cap, scores)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.float().masked_fill(~mask, -torch.inf)
    if form.sinks is not None:
        sinks = form.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    shares = scores.softmax(-1)[..., : key.shape[2]]
    return shares.to(query.dtype) @ value


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    form: Form,
) -> torch.Tensor:
    """(rows, heads, length, width): FlexAttention; shapes as in `attend`.

    A sink takes its share of the softmax: the output is multiplied by the share that the keys have left, sigmoid(lse - sink).
    """
    options: dict[str, Any] = {"block_mask": mask, "scale": form.scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if form.cap is not None:
        options["score_mod"] = partial(_capped, form.cap)
    if form.sinks is not None:
        options["return_aux"] = AuxRequest(lse=True)
    # A compiled model compiles it too; on a CPU, in tests, the plain form is used.
    run: Any = _compiled_flex() if has_flex(query.device) and not torch.compiler.is_compiling() else flex_attention
    if form.sinks is None:
        output: torch.Tensor = run(query, key, value, **options)
        return output
    attended, aux = run(query, key, value, **options)
    share = torch.sigmoid(aux.lse - form.sinks.float().view(1, -1, 1))  # (rows, heads, length)
    shared: torch.Tensor = (attended * share[..., None]).to(query.dtype)
    return shared


def _capped(cap: float, score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
    return cap * torch.tanh(score / cap)
