"""A digest of what a model computes: the bytes of its weights, and the settings that change what the same weights compute."""

import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from minicache.machine import cores
from minicache.models.settings import setting

# Settings that no tensor's shape shows. A setting that a config lacks, or has as None, does not count.
SETTINGS = (
    "model_type",
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    *("hidden_act", "hidden_activation", "activation_function"),
    *("rope_parameters", "partial_rotary_factor", "sliding_window", "layer_types", "clip_qkv"),
    "attention_chunk_size",
    *("num_experts_per_tok", "moe_k", "moe_topk", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("logits_scaling", "logit_scale", "attention_multiplier", "embedding_multiplier", "residual_multiplier"),
)
# Elements of a parameter that `sampled_digest` reads.
SAMPLED = 64


def fingerprint(model: nn.Module) -> str:
    """blake2b-128, hex, over name, dtype, shape and bytes of every stored tensor, a tied one once, and over `SETTINGS`.

    The same model gives the same digest whatever file, directory or name it came from.
    """
    unique: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in sorted(model.state_dict().items()):
        unique.setdefault(tensor.data_ptr(), (name, tensor))
    with ThreadPoolExecutor(min(8, cores())) as pool:
        digests = list(pool.map(_tensor_digest, unique.values()))
    return blake2b(b"".join([*digests, _settings(model.config).encode()]), digest_size=16).hexdigest()


def sampled_digest(model: nn.Module) -> str:
    """blake2b-64, hex, over name, dtype, shape and some elements of every parameter: in a moment, where they lie.

    Weights of another training differ nearly everywhere; a few flipped bits are not found.
    """
    state = blake2b(digest_size=8)
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
        state.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        state.update(some.view(torch.uint8).numpy().data)
    return state.hexdigest()


def _tensor_digest(item: tuple[str, torch.Tensor]) -> bytes:
    name, tensor = item
    state = blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.digest()


def _settings(config: Any) -> str:
    text = config.get_text_config()
    values = {name: _plain(setting(text, name)) for name in SETTINGS}
    return json.dumps({name: value for name, value in values.items() if value is not None}, sort_keys=True)


def _plain(value: Any) -> Any:
    """The value with numbers rounded to 6 digits: a .gguf stores 1e-5 in float32, and 10000 and 10000.0 are the same base."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.6g}"
    return value if value is None or isinstance(value, bool | str) else str(value)
