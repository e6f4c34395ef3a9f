"""MiniMind2 as of April 2025: Llama with rotary positions on neighbouring numbers; mixtures with one expert for every token.

Source: jingyaogong/minimind, model/model.py and model/LMConfig.py.
"""

import torch
from torch import Tensor

from tests.references.formulas import (
    Computed,
    Settings,
    State,
    angles,
    attend,
    balance_by_sequence,
    count,
    heads_of,
    mix,
    rms_norm,
    swiglu,
    under,
)

DEFAULTS = Settings(heads=8, kv_heads=2, experts_per_token=2, rms_eps=1e-5)


def shapes(experts: int, shared: int = 1, vocabulary: int = 400, width: int = 64) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a model of two layers; experts: 0 for a dense one. shared: always 1 here, under a key without a number."""
    kv = width * DEFAULTS.kv_heads // DEFAULTS.heads
    inner = -(-int(8 * width / 3) // 64) * 64  # two thirds of 4 x width, rounded up
    sizes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocabulary, width)}
    for layer in ("layers.0.", "layers.1."):
        rows = {"wq": width, "wk": kv, "wv": kv, "wo": width}
        sizes |= {f"{layer}attention.{part}.weight": (rows[part], width) for part in rows}
        sizes |= {f"{layer}{norm}.weight": (width,) for norm in ("attention_norm", "ffn_norm")}
        blocks = [f"experts.{at}." for at in range(experts)] + ["shared_experts."] if experts else [""]
        for block in blocks:
            place = f"{layer}feed_forward.{block}"
            sizes |= {f"{place}w1.weight": (inner, width), f"{place}w3.weight": (inner, width)}
            sizes |= {f"{place}w2.weight": (width, inner)}
        if experts:
            sizes[f"{layer}feed_forward.gate.weight"] = (experts, width)
    return sizes | {"norm.weight": (width,), "output.weight": (vocabulary, width)}


def compute(state: State, ids: Tensor, settings: Settings = DEFAULTS) -> Computed:
    """The logits, and the scores of the routers, of token ids (R, L)."""
    x, scores = state["tok_embeddings.weight"].double()[ids], []  # (R, L, width)
    for layer in range(count(state, "layers.")):
        weights = under(state, f"layers.{layer}.")
        x = x + attention(rms_norm(x, weights["attention_norm.weight"], settings.rms_eps), weights, settings)
        normed = rms_norm(x, weights["ffn_norm.weight"], settings.rms_eps)
        if "feed_forward.gate.weight" in weights:
            scores.append((normed @ weights["feed_forward.gate.weight"].T).softmax(-1))
            outputs = [feed_forward(normed, weights, f"experts.{at}.") for at in range(scores[-1].shape[-1])]
            x = x + mix(scores[-1], settings.experts_per_token, outputs)
            x = x + feed_forward(normed, weights, "shared_experts.")
        else:
            x = x + feed_forward(normed, weights, "")
    x = rms_norm(x, state["norm.weight"].double(), settings.rms_eps)
    return Computed(x @ state["output.weight"].double().T, scores)


def attention(x: Tensor, weights: State, settings: Settings) -> Tensor:
    """Causal self-attention. x: (R, L, width); returns the same shape."""
    q = heads_of(x, weights["attention.wq.weight"], settings.heads)
    k = heads_of(x, weights["attention.wk.weight"], settings.kv_heads)
    v = heads_of(x, weights["attention.wv.weight"], settings.kv_heads)
    q, k = (turn_pairs(part, settings.rope_theta) for part in (q, k))
    return attend(q, k, v) @ weights["attention.wo.weight"].T


def turn_pairs(x: Tensor, theta: float) -> Tensor:
    """Rotary positions on pairs (2i, 2i + 1), each a complex number. x: (R, L, heads, size); returns the same shape."""
    turn = angles(x.shape[1], x.shape[3], theta)[:, None]  # (L, 1, size / 2)
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(turn), turn)).flatten(-2)


def feed_forward(x: Tensor, weights: State, block: str) -> Tensor:
    """The gated feed-forward layer, or one expert of it. x: (R, L, width); returns the same shape."""
    gate, up, down = (weights[f"feed_forward.{block}{part}.weight"] for part in ("w1", "w3", "w2"))
    return swiglu(x, gate, up, down)


def balance_loss(scores: list[Tensor], top: int, weight: float) -> Tensor:
    """(R,): every sequence is balanced for itself; a batch's loss is their mean. scores: as `Computed`'s."""
    return weight * balance_by_sequence(scores, top)
