"""MiniMind 3: Qwen3, whose heads are normalised before they turn; mixtures of routed experts alone, one a token.

Source: jingyaogong/minimind, model/model_minimind.py. What it can do to rotary positions (`inference_rope_scaling`) is for
generating longer texts than it was trained on; a model in training, and so in DPO, has none of it.
"""

import math

import torch
from torch import Tensor

from tests.references.formulas import (
    Computed,
    Settings,
    State,
    attend,
    count,
    heads_of,
    mix,
    picks,
    rms_norm,
    swiglu,
    turn_halves,
    under,
)

DEFAULTS = Settings(heads=8, kv_heads=4, experts_per_token=1, rms_eps=1e-6)


def shapes(experts: int, shared: int = 0, vocabulary: int = 400, width: int = 64) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a model of two layers; experts: 0 for a dense one. shared: this generation has none."""
    size = width // DEFAULTS.heads
    kv = DEFAULTS.kv_heads * size
    inner = math.ceil(width * math.pi / 64) * 64
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in ("model.layers.0.", "model.layers.1."):
        rows = {"q": width, "k": kv, "v": kv, "o": width}
        sizes |= {f"{layer}self_attn.{part}_proj.weight": (rows[part], width) for part in rows}
        sizes |= {f"{layer}self_attn.{part}_norm.weight": (size,) for part in "qk"}
        sizes |= {f"{layer}{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for block in [f"experts.{at}." for at in range(experts)] or [""]:
            place = f"{layer}mlp.{block}"
            sizes |= {f"{place}gate_proj.weight": (inner, width), f"{place}up_proj.weight": (inner, width)}
            sizes |= {f"{place}down_proj.weight": (width, inner)}
        if experts:
            sizes[f"{layer}mlp.gate.weight"] = (experts, width)
    return sizes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def compute(state: State, ids: Tensor, settings: Settings = DEFAULTS) -> Computed:
    """The logits, and the scores of the routers, of token ids (R, L)."""
    x, scores = state["model.embed_tokens.weight"].double()[ids], []  # (R, L, width)
    for layer in range(count(state, "model.layers.")):
        weights = under(state, f"model.layers.{layer}.")
        x = x + attention(rms_norm(x, weights["input_layernorm.weight"], settings.rms_eps), weights, settings)
        normed = rms_norm(x, weights["post_attention_layernorm.weight"], settings.rms_eps)
        if "mlp.gate.weight" in weights:
            scores.append((normed @ weights["mlp.gate.weight"].T).softmax(-1))
            outputs = [feed_forward(normed, weights, f"experts.{at}.") for at in range(scores[-1].shape[-1])]
            x = x + mix(scores[-1], settings.experts_per_token, outputs)
        else:
            x = x + feed_forward(normed, weights, "")
    x = rms_norm(x, state["model.norm.weight"].double(), settings.rms_eps)
    return Computed(x @ state["lm_head.weight"].double().T, scores)


def attention(x: Tensor, weights: State, settings: Settings) -> Tensor:
    """Causal self-attention. x: (R, L, width); returns the same shape."""
    q = heads_of(x, weights["self_attn.q_proj.weight"], settings.heads)
    k = heads_of(x, weights["self_attn.k_proj.weight"], settings.kv_heads)
    v = heads_of(x, weights["self_attn.v_proj.weight"], settings.kv_heads)
    q = rms_norm(q, weights["self_attn.q_norm.weight"], settings.rms_eps)
    k = rms_norm(k, weights["self_attn.k_norm.weight"], settings.rms_eps)
    q, k = (turn_halves(part, settings.rope_theta) for part in (q, k))
    return attend(q, k, v) @ weights["self_attn.o_proj.weight"].T


def feed_forward(x: Tensor, weights: State, block: str) -> Tensor:
    """The gated feed-forward layer, or one expert of it. x: (R, L, width); returns the same shape."""
    gate, up, down = (weights[f"mlp.{block}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return swiglu(x, gate, up, down)


def balance_loss(scores: list[Tensor], top: int, weight: float) -> Tensor:
    """(R,): all tokens of the batch are balanced together, so that every sequence has the same. scores: as `Computed`'s.

    Of each layer: experts x sum over experts of (picks a token) x (its mean score). Unlike in the earlier generations the picks
    are not divided by `top`, so that even routing gives `top` a layer.
    """
    layers = [layer.shape[-1] * (picks(layer, top).mean((0, 1)) * layer.mean((0, 1))).sum() for layer in scores]
    return weight * torch.stack(layers).sum().expand(len(scores[0]))
