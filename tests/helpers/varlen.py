"""Variable-length attention on a CPU, as torch documents it for GPUs: in float64, one sequence after another."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention import varlen

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# What each call was asked for, and what the gradient of the query is multiplied by.
calls: list[dict[str, Any]] = []
wrong = [1.0]


def register() -> None:
    """Let `varlen_attn` run on a CPU. Once in a process is enough."""
    operations: Any = varlen
    operations._varlen_attn.register_kernel("cpu")(_forward)
    operations._varlen_attn_backward.register_kernel("cpu")(_backward)


def _each(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Any, of_keys: Any, scale: Any, window: Any
) -> Iterator[tuple[slice, slice, Tensors, torch.Tensor, float]]:
    """For each sequence: its places among queries and keys, these by heads in float64, the shares of its softmax, the scale.

    Where there are more keys than queries, the last query is at the last key.
    """
    starts, of_keys = starts.tolist(), of_keys.tolist()
    for index in range(len(starts) - 1):
        mine, read = slice(*starts[index : index + 2]), slice(*of_keys[index : index + 2])
        q, k, v = (
            query[mine].double().transpose(0, 1),
            key[read].double().transpose(0, 1),
            value[read].double().transpose(0, 1),
        )
        k, v = (each.repeat_interleave(len(q) // len(k), 0) for each in (k, v))
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
        seen = (distance >= -window[1]) & ((distance <= window[0]) if window[0] >= 0 else True)
        yield mine, read, (q, k, v), (q @ k.mT * factor).masked_fill(~seen, -torch.inf).softmax(-1), factor


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *others: Any,
    **options: Any,
) -> Tensors:
    assert window_size and window_size[1] == 0 and is_causal == (window_size[0] == -1)
    assert query.dtype == key.dtype == value.dtype and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
    calls.append({"window": window_size[0], "dtype": query.dtype, "sequences": len(cu_seq_q) - 1})
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for mine, _, (_, _, v), shares, _ in _each(query, key, value, cu_seq_q, cu_seq_k, scale, window_size):
        output[mine] = (shares @ v).transpose(0, 1).to(query.dtype)
    lse = torch.zeros(query.shape[1], len(query))
    return output, lse, torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: torch.Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
) -> Tensors:
    of_query, of_key, of_value = (torch.empty(each.shape, dtype=torch.float64) for each in (query, key, value))
    for mine, read, (q, k, v), shares, factor in _each(query, key, value, cu_seq_q, cu_seq_k, scale, window_size):
        due = grad_out[mine].double().transpose(0, 1)
        of_shares = due @ v.mT
        of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) * factor
        of_query[mine] = (of_scores @ k).transpose(0, 1) * wrong[0]
        for all_, of_heads in ((of_key, of_scores.mT @ q), (of_value, shares.mT @ due)):
            all_[read] = of_heads.unflatten(0, (all_.shape[1], -1)).sum(1).transpose(0, 1)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)
