"""MiniMind checkpoints (.pth): a state dict and nothing else, of one of three generations, recognised by its keys.

All three compute what a transformers class computes: 2504 and 2510 what Llama does (2504 with rotary positions on interleaved
pairs, which is Llama on re-ordered rows of q and k), 3 what Qwen3 does.
Source: jingyaogong/minimind, model/model.py (2504), model/model_minimind.py (2510, 3).
"""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minicache.errors import ModelError

State = dict[str, torch.Tensor]
ROPE_THETA, POSITIONS = 1e6, 32768


@dataclass(frozen=True)
class Generation:
    """What the file of a generation does not carry, and how its keys read.

    marker: a key that only this generation has. names: (pattern, transformers' name), applied in order.
    interleaved: rotary positions turn neighbouring dimensions, not the two halves.
    """

    name: str
    marker: str
    family: str
    heads: int
    kv_heads: int
    rms_eps: float
    names: tuple[tuple[str, str], ...] = ()
    interleaved: bool = False


NAMES_2504 = (
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^layers\.(\d+)\.attention\.w([qkvo])\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"^layers\.(\d+)\.attention_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^layers\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^layers\.(\d+)\.feed_forward\.w1\.", r"model.layers.\1.mlp.gate_proj."),
    (r"^layers\.(\d+)\.feed_forward\.w2\.", r"model.layers.\1.mlp.down_proj."),
    (r"^layers\.(\d+)\.feed_forward\.w3\.", r"model.layers.\1.mlp.up_proj."),
)
GENERATIONS = (
    Generation("MiniMind-3", "model.layers.0.self_attn.q_norm.weight", "qwen3", 8, 4, 1e-6),
    Generation("MiniMind 2510", "model.layers.0.self_attn.q_proj.weight", "llama", 8, 2, 1e-5),
    Generation("MiniMind 2504", "layers.0.attention.wq.weight", "llama", 8, 2, 1e-5, NAMES_2504, interleaved=True),
)


def load(path: Path) -> nn.Module:
    """A dense MiniMind checkpoint as the transformers model that computes the same.

    Raises:
        ModelError: it is no state dict of tensors, of no known generation, or a mixture of experts.
    """
    state = _read(path)
    generation = next((item for item in GENERATIONS if item.marker in state), None)
    if generation is None:
        known = ", ".join(item.name for item in GENERATIONS)
        raise ModelError(
            f"{path}: expected a checkpoint of {known}; found keys like {', '.join(list(state)[:3]) or 'none'}"
        )
    if any(".experts." in key for key in state):
        raise ModelError(f"{path}: a mixture-of-experts {generation.name}; only dense ones can be loaded")
    try:
        return _build(_renamed(state, generation), generation)
    except (KeyError, ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise ModelError(f"{path}: not a whole dense {generation.name} checkpoint: {line}") from error


def _read(path: Path) -> State:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path}: not a file of tensors alone, or damaged (pickled code is never run): {line}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path}: expected a dict of tensors, as torch.save(model.state_dict(), …) writes it")
    # DDP and torch.compile put their own prefixes before the names.
    return {key.removeprefix("_orig_mod.").removeprefix("module."): value for key, value in state.items()}


def _renamed(state: State, generation: Generation) -> State:
    """The same tensors under transformers' names, without the rotary tables, which are computed anew."""
    renamed = {}
    for key, value in state.items():
        if key.endswith(("freqs_cos", "freqs_sin", "pos_cis")):
            continue
        for pattern, name in generation.names:
            key = re.sub(pattern, name, key)
        if generation.interleaved and key.endswith(("q_proj.weight", "k_proj.weight")):
            value = _halves_from_pairs(value, generation.heads if "q_proj" in key else generation.kv_heads)
        renamed[key] = value
    return renamed


def _halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Re-order a head's rows 0 1 2 3 … to 0 2 … 1 3 …: rotating halves then does what rotating pairs did before."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _build(state: State, generation: Generation) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    embedding, layer = state["model.embed_tokens.weight"], "model.layers.0."
    vocabulary, hidden = embedding.shape
    config = AutoConfig.for_model(
        generation.family,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=state[layer + "mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=1 + max(int(key.split(".")[2]) for key in state if key.startswith("model.layers.")),
        num_attention_heads=generation.heads,
        num_key_value_heads=generation.kv_heads,
        head_dim=state[layer + "self_attn.q_proj.weight"].shape[0] // generation.heads,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=generation.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=torch.equal(embedding, state["lm_head.weight"]),
        dtype=embedding.dtype,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=embedding.dtype)
    model.load_state_dict(state)
    return model
