"""What families.py cannot find out from a family's defaults: sizes that hang together, variants, windows by other names."""

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MIXED = {"layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"]}
_HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
# Many heads: with few of them scores are often all 0, and which of equal scores are the largest depends on padding.
_SPARSE_INDEX = ("index 8", {"index_topk": 8, "index_n_heads": 16})
_DECODER = ("as a decoder", {"is_decoder": True})
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": ...}
_WINDOW = {"sliding_window": 8}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_SWA = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_kv_lora_rank": 16,
    "swa_q_lora_rank": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_qk_rope_head_dim": 8,
    "swa_v_head_dim": 16,
    "swa_head_dim": 24,
}
_DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "max_position_embeddings": 24,
}
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "max_position_embeddings": 96,
}
# The short factors up to 24 tokens, the long ones above.
_LONG = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + index for index in range(8)],
        "original_max_position_embeddings": 24,
    },
    "original_max_position_embeddings": 24,
    "max_position_embeddings": 96,
}

# By model type. "needed": what its class needs to be made at all. `...`: not given, so that the class's own default holds.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "layers_block_type": ...},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            name: {**_ROPE, "mrope_section": [3, 3, 2]} for name in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1},
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "n_recurrent_layers": ...,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1},
    "dots3_note": {"audio_config": {"adapter_input_size": 64}},
    "dots3_note_text": {"head_dim": 24, **_SWA},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
    },
    "gemma4_assistant": {
        "needed": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
    },
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_HYBRID, "shared_intermediate_size": 48},
    "hrm_text": {"num_hidden_layers": ..., "num_layers_per_stack": 2, "L_bp_cycles": [2]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 4,
        "expert_layer_offset": 2,
    },
    "laguna": {**_MIXED, "num_attention_heads_per_layer": [4, 8]},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "full_attn_idxs": ...},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["chunked_attention", "chunked_attention", "full_attention", "full_attention"],
        "no_rope_layers": [1, 1, 0, 0],
        "moe_layers": [1, 3],
    },
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4},
    "mamba2": {"head_dim": 16, "num_heads": 8},
    "mellum": {**_MIXED, "mlp_layer_types": ["sparse", "sparse"]},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "vocab_size": 512,
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 48],
        "num_hidden_layers": ...,
    },
    # By default its kernels round to bfloat16, in ways that depend on the batch.
    "xlstm": {"autocast_kernel_dtype": "float32"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}

# By model type: the name of a variant, and its settings.
VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "axk2": [_SPARSE_INDEX],
    "bert": [_DECODER],
    "bert-generation": [_DECODER],
    "deepseek_v32": [_SPARSE_INDEX],
    "falcon": [
        ("new architecture", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("alibi", {"alibi": True}),
    ],
    "glm_moe_dsa": [_SPARSE_INDEX],
    "gpt2": [("scaled by layer", {"scale_attn_by_inverse_layer_idx": True})],
    "gpt_bigcode": [("many heads", {"multi_query": False})],
    "llama": [("dynamic NTK", _DYNAMIC), ("YaRN", _YARN), ("long rope", _LONG)],
    "opt": [("post-norm, projected", {"do_layer_norm_before": False, "word_embed_proj_dim": 32})],
    "phi3": [("long rope", _LONG)],
    "qwen2": [("tied", {"tie_word_embeddings": True})],
    "qwen4_exp_text": [
        (
            "n-gram embeddings",
            {
                "ple_layer_ids": [1],
                "ple_embed_dim": 64,
                "ngram_vocab_size_base": 200,
                "split_ngram_parts": 2,
                "eos_token_id": 2,
            },
        )
    ],
    "roberta": [_DECODER],
    "xlm-roberta": [_DECODER],
}

# By model type: how its windows are made narrow, where its defaults do not say so; {}: there are none.
WINDOWS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"window_size": 8},
    "llama4_text": {"attention_chunk_size": 8},
    "ministral3": _WINDOW,
    "mixtral": _WINDOW,
    "moshi": {},
    "phi3": _WINDOW,
    "phimoe": _WINDOW,
    "qwen2": _QWEN_WINDOW,
    "qwen2_moe": _QWEN_WINDOW,
    "qwen3": _QWEN_WINDOW,
    "qwen3_moe": _QWEN_WINDOW,
    "recurrent_gemma": {"attention_window_size": 8},
    "starcoder2": _WINDOW,
}

# By model type: what a family is, where neither its defaults nor transformers' other lists say so.
NATURES: dict[str, str] = {
    "blt": "bytes in patches",
    "gemma4_assistant": "draft model",
    "gemma4_unified_assistant": "draft model",
    "reformer": "decoder",
    "trocr": "decoder of an encoder-decoder",
    "whisper": "decoder of an encoder-decoder",
    "xlm": "encoder",
    "xlnet": "encoder",
}
