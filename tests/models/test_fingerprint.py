"""The fingerprint's settings: each of them makes the same weights another model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from minicache.models.fingerprint import SETTINGS, fingerprint

# Written out again, so that one that is lost is missed here; values are of the kinds that configs have.
VALUES: dict[str, tuple[Any, Any]] = {
    "model_type": ("llama", "qwen3"),
    "num_attention_heads": (8, 4),
    "num_key_value_heads": (4, 2),
    "head_dim": (64, 32),
    "rms_norm_eps": (1e-5, 1e-6),
    "layer_norm_eps": (1e-5, 1e-6),
    "layer_norm_epsilon": (1e-5, 1e-6),
    "norm_eps": (1e-5, 1e-6),
    "norm_epsilon": (1e-5, 1e-6),
    "hidden_act": ("silu", "gelu"),
    "hidden_activation": ("silu", "gelu"),
    "activation_function": ("silu", "gelu"),
    "rope_parameters": ({"rope_theta": 10000.0}, {"rope_theta": 1e6}),
    "partial_rotary_factor": (0.5, 0.25),
    "sliding_window": (4096, 512),
    "layer_types": (["full_attention"], ["sliding_attention"]),
    "clip_qkv": (8.0, 6.0),
    "attention_chunk_size": (8192, 4096),
    "num_experts_per_tok": (2, 4),
    "moe_k": (2, 4),
    "moe_topk": (2, 4),
    "norm_topk_prob": (True, False),
    "routed_scaling_factor": (1.0, 2.5),
    "n_group": (1, 8),
    "topk_group": (1, 4),
    "query_pre_attn_scalar": (256, 144),
    "attn_logit_softcapping": (50.0, 30.0),
    "final_logit_softcapping": (50.0, 30.0),
    "logits_scaling": (1.0, 8.0),
    "logit_scale": (1.0, 0.0625),
    "attention_multiplier": (1.0, 0.0078125),
    "embedding_multiplier": (1.0, 12.0),
    "residual_multiplier": (1.0, 0.22),
}


def digest(**settings: Any) -> str:
    """Of one set of weights under these settings."""
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**settings))  # type: ignore[assignment]
    return fingerprint(model)


def test_every_setting_is_tested_here() -> None:
    assert VALUES.keys() == set(SETTINGS)


@pytest.mark.parametrize("name", VALUES)
def test_another_value_of_a_setting_is_another_model(name: str) -> None:
    first, other = VALUES[name]
    found = [digest(), digest(**{name: first}), digest(**{name: other})]
    assert len(set(found)) == 3
    assert digest(**{name: None}) == found[0], "a setting that a config has as None does not count"


def test_what_changes_no_value_does_not_count() -> None:
    assert digest(use_cache=True, torch_dtype=torch.float16) == digest(use_cache=False)
    # as a .gguf keeps it
    assert digest(rms_norm_eps=1e-5) == digest(rms_norm_eps=9.999999747378752e-06)
    assert digest(rope_parameters={"rope_theta": 10000}) == digest(rope_parameters={"rope_theta": 10000.0})
