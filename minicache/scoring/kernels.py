"""Attention over the pairs of a packed row, each a prefix with two branches that do not see each other: what computes it.

varlen: torch's variable-length FlashAttention, in half precision on CUDA, without a compiler. flex: FlexAttention, compiled, which
skips the blocks that no token sees. spans: a walk over the pairs, each by torch's own attention. They compute the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from minicache.processes.devices import has_flash, has_flex, kind_of
from minicache.scoring.batch import Sequences

Mask = torch.Tensor | BlockMask | None
# Heads up to this wide are grouped in FlashAttention on every card that it runs on, also where a backward pass follows.
WIDEST_GROUPED = 192
# More than the runs of a sweep over several models ask for.
FORMS = 128
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

    sequences: for variable-length attention; None: it walks. window: as in the spans, for the host to read without waiting.
    """

    sequences: Sequences | None = None
    window: int = 0

    @classmethod
    def of(cls, spans: torch.Tensor, window: int, sequences: Sequences | None = None) -> "Spans":
        """The mask of the spans of a batch, (1, 1, pairs, 4)."""
        made = torch.nn.functional.pad(spans, (0, 1), value=window).as_subclass(cls)
        made.sequences, made.window = sequences, window
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return _attend_as_torch(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


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
    return attended(query, key, value, attn_mask, Form(scale))


@contextmanager
def as_if_fused() -> Iterator[None]:
    """Within this every form of attention makes tensors of the sizes that a fused kernel makes; what they hold is another thing."""
    _as_fused.append(True)
    try:
        yield
    finally:
        _as_fused.pop()


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Mask, form: Form) -> torch.Tensor:
    """The attention output, (rows, heads, length, width).

    query: (rows, heads, length, width). key, value: the same with the number of key and value heads.
    mask: a block mask, the spans of a packed row, or (rows, 1, length, length) bool, True where a query sees a key. None: plain
        causal attention.

    Raises:
        ValueError: the kernel that the mask is for does not compute this form.
    """
    if isinstance(mask, BlockMask):
        query, key, value = _in_one_precision(query, key, value)
        return _flex(query, key, value, mask, form)
    if isinstance(mask, Spans):
        if query.shape[0] != 1:
            raise ValueError("its attention changes the number of rows")
        if mask.sequences is not None:
            query, key, value = _in_one_precision(query, key, value)
            return _by_sequences(query, key, value, mask.sequences, mask.window, form)
        return _by_spans(query, key, value, mask, form)
    return _masked(query, key, value, mask, form)


def _in_one_precision(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors in the precision of autocast, which knows torch's own attention, but no other in each release."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _in_groups(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether torch's attention lets a group of query heads read one key head, and yet makes no scores. Shapes as in `_masked`.

    On CUDA only FlashAttention does, which takes no mask and computes in half precision: torch has scores made otherwise, (rows,
    heads, queries, keys), and keeps them for backward. Its memory-efficient kernel takes all else, from a key head for each query
    head. Source: torch's aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    if _as_fused or kind_of(query) != "cuda":
        return True
    return mask is None and query.dtype != torch.float32 and query.shape[-1] <= WIDEST_GROUPED and has_flash()


def _by_sequences(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: Sequences, window: int, form: Form
) -> torch.Tensor:
    """(1, heads, length, width): variable-length attention over a packed row; shapes as in `attended`.

    Where a sequence has more keys than queries, its last query is at its last key. window: see `_causal`.
    """
    from torch.nn.attention.varlen import varlen_attn

    if not form.is_plain:
        raise ValueError("variable-length attention has no soft caps and no sinks")
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"variable-length attention computes in half precision, not in {query.dtype}")
    # (length, heads, width); the prefix is read by both of its branches
    flat, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output: Any = varlen_attn(
        flat,
        keys.index_select(0, sequences.gathered),
        values.index_select(0, sequences.gathered),
        sequences.queries,
        sequences.keys,
        sequences.most_queries,
        sequences.most_keys,
        scale=form.scale,
        window_size=(window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    by_head: torch.Tensor = output.transpose(0, 1)[None]
    return by_head


def _by_spans(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    form: Form,
) -> torch.Tensor:
    """(1, heads, length, width): attention over a packed row, a pair at a time; shapes as in `attended`."""
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
    """(rows, heads, queries, width): attention under a mask, (…, queries, keys) bool, or None: causal. Shapes as in `attended`."""
    groups = query.shape[1] // key.shape[1]
    if form.is_plain or _as_fused:
        if kind_of(query) == "cuda":
            # the choice of a kernel depends on it
            query, key, value = _in_one_precision(query, key, value)
        grouped = groups > 1 and _in_groups(query, mask)
        if groups > 1 and not grouped:
            key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=form.scale, enable_gqa=grouped
        )
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    # (rows, heads, queries, keys)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if form.scale is None else form.scale)
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


@cache
def _compiled_flex() -> Any:
    """FlexAttention, compiled for each form, precision and shape of heads, with gradients and without.

    Beyond torch's own limit, 8, it would be computed as it is written, with scores.
    """
    limit: Any = {"recompile_limit": FORMS} if "recompile_limit" in signature(torch.compile).parameters else {}
    if not limit:
        # of older versions, for all that a process compiles
        torch._dynamo.config.recompile_limit = FORMS
    # dynamic, because a packed row has another length in every batch
    return torch.compile(flex_attention, dynamic=True, **limit)


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    form: Form,
) -> torch.Tensor:
    """(rows, heads, length, width): FlexAttention; shapes as in `attended`.

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
    found, aux = run(query, key, value, **options)
    share = torch.sigmoid(aux.lse - form.sinks.float().view(1, -1, 1))  # (rows, heads, length)
    shared: torch.Tensor = (found * share[..., None]).to(query.dtype)
    return shared


def _capped(cap: float, score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
    return cap * torch.tanh(score / cap)
