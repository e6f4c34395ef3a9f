"""MiniMind2 as of October 2025: Llama, its mixtures with experts for every token beside the routed ones.

Source: jingyaogong/minimind, model/model_minimind.py then. What it can do to rotary positions (`inference_rope_scaling`) is for
generating longer texts than it was trained on; a model in training, and so in DPO, has none of it.
"""

from torch import Tensor

from tests.references.formulas import (
    Computed,
    Settings,
    State,
    attend,
    balance_by_sequence,
    count,
    heads_of,
    mix,
    rms_norm,
    swiglu,
    turn_halves,
    under,
)

DEFAULTS = Settings(heads=8, kv_heads=2, experts_per_token=2, rms_eps=1e-5)


def shapes(experts: int, shared: int = 1, vocabulary: int = 400, width: int = 64) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a model of two layers; experts: 0 for a dense one."""
    kv = width * DEFAULTS.kv_heads // DEFAULTS.heads
    inner = -(-int(8 * width / 3) // 64) * 64
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in ("model.layers.0.", "model.layers.1."):
        rows = {"q": width, "k": kv, "v": kv, "o": width}
        sizes |= {f"{layer}self_attn.{part}_proj.weight": (rows[part], width) for part in rows}
        sizes |= {f"{layer}{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        blocks = [f"experts.{at}." for at in range(experts)] + [f"shared_experts.{at}." for at in range(shared)]
        for block in blocks if experts else [""]:
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
            for at in range(count(weights, "mlp.shared_experts.")):
                x = x + feed_forward(normed, weights, f"shared_experts.{at}.")
        else:
            x = x + feed_forward(normed, weights, "")
    x = rms_norm(x, state["model.norm.weight"].double(), settings.rms_eps)
    return Computed(x @ state["lm_head.weight"].double().T, scores)


def attention(x: Tensor, weights: State, settings: Settings) -> Tensor:
    """Causal self-attention. x: (R, L, width); returns the same shape."""
    q = heads_of(x, weights["self_attn.q_proj.weight"], settings.heads)
    k = heads_of(x, weights["self_attn.k_proj.weight"], settings.kv_heads)
    v = heads_of(x, weights["self_attn.v_proj.weight"], settings.kv_heads)
    q, k = (turn_halves(part, settings.rope_theta) for part in (q, k))
    return attend(q, k, v) @ weights["self_attn.o_proj.weight"].T


def feed_forward(x: Tensor, weights: State, block: str) -> Tensor:
    """The gated feed-forward layer, or one expert of it. x: (R, L, width); returns the same shape."""
    gate, up, down = (weights[f"mlp.{block}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return swiglu(x, gate, up, down)


def balance_loss(scores: list[Tensor], top: int, weight: float) -> Tensor:
    """(R,): every sequence is balanced for itself; a batch's loss is their mean. scores: as `Computed`'s."""
    return weight * balance_by_sequence(scores, top)
