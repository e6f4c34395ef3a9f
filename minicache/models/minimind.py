"""MiniMind checkpoints (.pth): a state dict and nothing else. The third generation computes what Qwen3 does.

Source: jingyaogong/minimind, model/model_minimind.py.
"""

import pickle
from pathlib import Path

import torch
from torch import nn

from minicache.errors import ModelError

# What the file does not carry, as MiniMind-3 has it.
HEADS, KV_HEADS, RMS_EPS, ROPE_THETA, POSITIONS = 8, 4, 1e-6, 1e6, 32768


def load(path: Path) -> nn.Module:
    """A dense MiniMind-3 checkpoint as a transformers Qwen3.

    Raises:
        ModelError: it is no state dict of tensors, or of another architecture.
    """
    state = _read(path)
    if not any(key.endswith("self_attn.q_norm.weight") for key in state):
        raise ModelError(
            f"{path}: expected a MiniMind-3 checkpoint (with q_norm weights), found keys like {_some(state)}"
        )
    if any(".experts." in key for key in state):
        raise ModelError(f"{path}: a mixture-of-experts MiniMind; only dense ones can be loaded")
    return _qwen3(state, path)


def _read(path: Path) -> dict[str, torch.Tensor]:
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


def _qwen3(state: dict[str, torch.Tensor], path: Path) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    try:
        vocabulary, hidden = state["model.embed_tokens.weight"].shape
        config = Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=state["model.layers.0.mlp.gate_proj.weight"].shape[0],
            num_hidden_layers=1 + max(int(key.split(".")[2]) for key in state if key.startswith("model.layers.")),
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=state["model.layers.0.self_attn.q_norm.weight"].shape[0],
            max_position_embeddings=POSITIONS,
            rms_norm_eps=RMS_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=torch.equal(state["model.embed_tokens.weight"], state["lm_head.weight"]),
            dtype=state["model.embed_tokens.weight"].dtype,
            bos_token_id=1,
            eos_token_id=2,
        )
        model: nn.Module = Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa")
        model.to(state["model.embed_tokens.weight"].dtype)
        rotary = {key for key in state if key.endswith(("freqs_cos", "freqs_sin"))}  # tables, computed anew
        model.load_state_dict({key: value for key, value in state.items() if key not in rotary})
    except (KeyError, ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise ModelError(f"{path}: not a dense MiniMind-3 checkpoint: {line}") from error
    return model


def _some(state: dict[str, torch.Tensor]) -> str:
    return ", ".join(list(state)[:3]) or "none"
