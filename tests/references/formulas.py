"""The formulas that the generations share. Everything is float64, dense and slow: no cache, no mask, no kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

State = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What decides a forward pass and no tensor shows; `experts_per_token` is read by mixtures alone."""

    heads: int
    kv_heads: int
    experts_per_token: int
    rms_eps: float
    rope_theta: float = 1e6


@dataclass(frozen=True)
class Computed:
    """The result of a forward pass.

    logits: (R, L, vocabulary). scores: of each layer of a mixture, the softmax over its experts, (R, L, experts).
    """

    logits: Tensor
    scores: list[Tensor]


def under(state: State, prefix: str) -> State:
    """The tensors whose keys begin with `prefix`, in float64, by the rest of their keys."""
    return {key.removeprefix(prefix): value.double() for key, value in state.items() if key.startswith(prefix)}


def count(state: State, prefix: str) -> int:
    """How many numbers follow `prefix` in the keys: layers, or experts of a layer."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., width) over the root of its mean square, times `weight` (width,)."""
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x: (..., width); gate, up: (inner, width); down: (width, inner). Returns: (..., width)."""
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def heads_of(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """x: (R, L, width); weight: (heads x size, width). Returns: (R, L, heads, size)."""
    return (x @ weight.T).reshape(*x.shape[:-1], heads, -1)


def angles(length: int, size: int, theta: float) -> Tensor:
    """(length, size / 2): by how much position p turns pair i of a head of `size`, p / theta^(2i / size)."""
    speeds = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return torch.arange(length, dtype=torch.float64)[:, None] * speeds


def turn_halves(x: Tensor, theta: float) -> Tensor:
    """Rotary positions on pairs (i, i + size / 2). x: (R, L, heads, size); returns the same shape."""
    turn = angles(x.shape[1], x.shape[3], theta)[:, None]  # (L, 1, size / 2)
    first, second = x.chunk(2, -1)
    return torch.cat([first * turn.cos() - second * turn.sin(), second * turn.cos() + first * turn.sin()], -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention; `heads / kv_heads` heads in a row read the same keys and values.

    q: (R, L, heads, size); k, v: (R, L, kv_heads, size). Returns: (R, L, heads x size).
    """
    k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], 2) for part in (k, v))
    scores = torch.einsum("rqhs,rkhs->rhqk", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("rhqk,rkhs->rqhs", weights, v).flatten(2)


def picks(scores: Tensor, top: int) -> Tensor:
    """1.0 for each of the `top` experts that a token goes to, else 0.0: as scores, (..., experts)."""
    return torch.zeros_like(scores).scatter(-1, scores.topk(top).indices, 1.0)


def clearness(scores: list[Tensor], top: int) -> float:
    """By how much the last chosen expert's score exceeds the next one's, at the token where that is least.

    Far more than rounding errors: then float32 sends every token to the same experts. scores: (..., experts) of each layer.
    """
    ranked = [layer.sort(-1, descending=True).values for layer in scores]
    return min((layer[..., top - 1] - layer[..., top]).min().item() for layer in ranked)


def mix(scores: Tensor, top: int, outputs: list[Tensor]) -> Tensor:
    """Outputs of the chosen experts, weighted by their scores, which are scaled to a sum of 1.

    scores: (..., experts); outputs: one (..., width) an expert. Returns: (..., width).
    """
    chosen = scores * picks(scores, top)
    weights = chosen / chosen.sum(-1, keepdim=True)
    return torch.einsum("...e,e...w->...w", weights, torch.stack(outputs))


def balance_by_sequence(scores: list[Tensor], top: int) -> Tensor:
    """Of each sequence, summed over layers: experts x sum over experts of (its share of the picks) x (its mean score).

    Even routing gives 1 a layer. scores: (R, L, experts) of each layer. Returns: (R,).
    """
    layers = [layer.shape[-1] * (picks(layer, top).mean(1) / top * layer.mean(1)).sum(-1) for layer in scores]
    return torch.stack(layers).sum(0)
