"""A tiny configuration of any family, made from the defaults of its class: small numbers for the sizes that it has.

Of the layers, so many stay that each kind of layer occurs; lists with an entry a layer are cut to the same ones.
"""

from dataclasses import dataclass, field
from typing import Any

from tests.zoo.overrides import NATURES, OVERRIDES, VARIANTS, WINDOWS

VOCABULARY = 512
# A window narrower than the answers.
NARROW = 8
PAD, BOS, EOS = 0, 1, 2
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_blocks",
    "decoder_layers",
    "num_decoder_layers",
)
MOST_LAYERS = 6

_WIDTH = (
    "hidden_size n_embd d_model dim_model embedding_dim emb_dim embedding_size word_embed_proj_dim lru_width "
    "input_embedding_size output_embedding_size backbone_hidden_size dim_model_base"
)
_INNER = (
    "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner feed_forward_size ffn_hidden_size "
    "intermediate_size_mlp dense_intermediate_size"
)
_EXPERT_INNER = (
    "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size shared_intermediate_size"
)
_HEADS = (
    "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_kv_heads linear_num_heads "
    "linear_num_value_heads"
)
_HEAD_SIZE = (
    "head_dim kv_channels d_head dim_head swa_head_dim v_head_dim qk_nope_head_dim index_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim global_head_dim kv_lora_rank"
)
_EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts"
_CHOSEN_EXPERTS = "num_experts_per_tok num_experts_per_token moe_topk moe_k"

SIZES: dict[str, int] = {
    **dict.fromkeys(_WIDTH.split(), 64),
    **dict.fromkeys(_INNER.split(), 96),
    **dict.fromkeys(_EXPERT_INNER.split(), 32),
    **dict.fromkeys(_HEADS.split(), 4),
    **dict.fromkeys(_HEAD_SIZE.split(), 16),
    **dict.fromkeys(_EXPERTS.split(), 4),
    **dict.fromkeys(_CHOSEN_EXPERTS.split(), 2),
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "index_n_heads": 2,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "n_group": 2,
    "topk_group": 1,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_mamba_heads": 8,
    "mamba_d_ssm": 128,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "n_groups": 2,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "encoder_layers": 2,
    "num_encoder_layers": 2,
    "rotary_dim": 8,
    "num_expert_group": 2,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "zero_expert_num": 2,
    "d_rel": 8,
    "hc_lowrank": 8,
    "adapter_in_dim": 64,
    "adapter_out_dim": 64,
    "o_lora_rank": 16,
    "o_groups": 2,
}
# Entries that are about other things than the model's computation, or follow from what is given.
UNTOUCHED = {"id2label", "label2id", "rope_parameters", "rope_scaling", "per_layer_config"}


@dataclass(frozen=True)
class Family:
    """A model to be made. name: of the row of the table. kind: transformers' model type. settings: override the tiny defaults."""

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


def families() -> list[Family]:
    """All families of the installed transformers, each also with a narrow window where it has one, and the variants."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    found = []
    for kind in sorted(causal):
        found.append(Family(kind, kind, OVERRIDES.get(kind, {})))
        if narrow := narrow_window(kind):
            found.append(Family(f"{kind}, window {NARROW}", kind, {**OVERRIDES.get(kind, {}), **narrow}))
        found += [
            Family(f"{kind}, {name}", kind, {**OVERRIDES.get(kind, {}), **more})
            for name, more in VARIANTS.get(kind, [])
        ]
    return found


def narrow_window(kind: str) -> dict[str, Any]:
    """The settings with which a family's windows are narrow; {} where it has none."""
    if kind in WINDOWS:
        return WINDOWS[kind]
    try:
        defaults = default_config(kind).to_dict()
    except Exception:
        return {}
    if "text_config" in defaults:
        return {}
    return {name: NARROW for name in ("sliding_window", "sliding_window_size") if defaults.get(name)}


def default_config(kind: str) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**OVERRIDES.get(kind, {}).get("needed", {}))


def tiny_config(family: Family) -> Any:
    """The configuration of a family: its class's defaults, made small."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[family.kind]
    given = {name: value for name, value in family.settings.items() if name != "needed"}
    given |= family.settings.get("needed", {})
    config = made(**_merged(_small(default_config(family.kind)), given))
    for part in (config, *(getattr(config, name) for name in _parts(config) if "text" in name or "decoder" in name)):
        for name, value in (("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS)):
            setattr(part, name, value)
    return config


def nature(family: Family) -> str:
    """What a family is: "decoder", the causal language models proper, or something else that the mapping lists too."""
    from transformers.models.auto import modeling_auto

    if family.settings.get("is_decoder"):
        return "decoder"
    if family.kind in NATURES:
        return NATURES[family.kind]
    try:
        defaults = default_config(family.kind).to_dict()
    except Exception as error:
        return f"cannot be made: {error}"
    if defaults["is_encoder_decoder"] or family.kind in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "encoder-decoder"
    if {"text_config", "vision_config", "audio_config", "audio_encoder", "patch_size"} & defaults.keys():
        return "multimodal"
    return "encoder" if defaults.get("is_decoder") is False else "decoder"


def _merged(small: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`small` with the values given; nested ones one by one. None removes an entry, so that the class's own default holds."""
    merged = dict(small)
    for name, value in given.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merged(merged[name], value)
        elif value is ...:
            merged.pop(name, None)
        else:
            merged[name] = value
    return merged


def _small(config: Any) -> dict[str, Any]:
    """The entries of a configuration that differ from its defaults because they are smaller."""
    defaults = {**config.to_dict()}
    small = {name: value for name, value in map(_made_small, defaults.items()) if value is not None}
    if defaults.get("kv_lora_rank"):
        small["num_key_value_heads"] = small.get("num_attention_heads", 4)
        if "head_dim" in small:
            small["head_dim"] = small["qk_rope_head_dim"]
    small |= {name: _small(getattr(config, name)) for name in _parts(config)}
    return small | _few_layers(defaults)


def _parts(config: Any) -> list[str]:
    """The names of the configurations inside a configuration."""
    return [name for name, value in vars(config).items() if hasattr(value, "to_diff_dict")]


def _made_small(entry: tuple[str, Any]) -> tuple[str, Any]:
    """The entry with its tiny value; None as its value if it stays as it is."""
    name, value = entry
    if name in UNTOUCHED or isinstance(value, bool) or not isinstance(value, int) or value == 0:
        return name, None
    if name in SIZES:
        return name, min(SIZES[name], value)
    if "vocab" in name:
        return name, min(VOCABULARY, value)
    if name == "max_position_embeddings":
        return name, min(2048, value)
    return name, None


def _few_layers(defaults: dict[str, Any]) -> dict[str, Any]:
    """The number of layers and the lists with an entry a layer, cut so that every combination of entries occurs once."""
    name = next((name for name in LAYERS if isinstance(defaults.get(name), int)), None)
    if name is None:
        return {}
    count = defaults[name]
    lists = {
        key: value
        for key, value in defaults.items()
        if isinstance(value, list) and len(value) == count and count > 2 and key not in UNTOUCHED
    }
    seen: dict[tuple[str, ...], int] = {}
    for layer in range(count):
        seen.setdefault(tuple(str(value[layer]) for value in lists.values()), layer)
    kept = sorted(seen.values())[:MOST_LAYERS]
    kept += [layer for layer in range(count) if layer not in kept][: max(0, 2 - len(kept))]
    kept.sort()
    return {name: len(kept), **{key: [value[layer] for layer in kept] for key, value in lists.items()}}
