"""The sizes of the tiny models, as data."""

from typing import Any

LAYERS = object()
"""Stands in `GENERIC` for the number of layers asked for."""

_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "depth", "num_blocks", "conf_num_hidden_layers",
)  # fmt: skip
_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
    "num_decoder_attention_heads", "num_encoder_attention_heads", "linear_num_heads", "swa_num_attention_heads",
    "linear_num_value_heads", "conf_num_attention_heads",
)  # fmt: skip
_WIDTH = (
    "hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "input_embedding_size", "output_embedding_size",
    "output_proj_dims", "out_hidden_size", "mm_embed_dim", "adapter_in_dim", "adapter_out_dim", "adapter_input_size",
    "hidden_size_global", "backbone_hidden_size", "router_hidden_size", "downsample_hidden_size",
)  # fmt: skip
_INNER = (
    "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "ffn_hidden_size", "dff",
    "dim_ff", "d_inner", "mlp_dim", "feed_forward_size", "mamba_d_ssm",
)  # fmt: skip
_EXPERT_INNER = (
    "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size",
)  # fmt: skip
_HEAD_WIDTH = (
    "head_dim", "v_head_dim", "qk_nope_head_dim", "index_head_dim", "indexer_head_dim", "linear_head_dim",
    "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim", "dim_head", "attention_head_size", "kv_channels",
    "mamba_d_head", "mamba_head_dim", "query_pre_attn_scalar", "hidden_size_per_layer_input",
)  # fmt: skip
_WINDOW = ("sliding_window", "sliding_window_size", "index_topk", "window_size")
_TWO = (
    "num_key_value_heads", "num_kv_heads", "kv_n_heads", "linear_num_key_heads", "swa_num_key_value_heads",
    "index_n_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
    "top_k_experts", "type_vocab_size", "mamba_n_groups", "n_groups", "n_mamba_heads", "time_step_rank",
    "mamba_dt_rank", "zero_expert_num", "o_groups",
)  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ONE = ("n_group", "topk_group", "num_shared_experts", "n_shared_experts", "first_k_dense_replace")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "original_max_position_embeddings")
_STATE = (
    "state_size", "mamba_d_state", "ssm_state_size", "mamba_n_heads", "mamba_num_heads", "mamba_chunk_size",
    "chunk_size", "block_size", "hc_lowrank", "o_lora_rank", "adapter_rank", "laurel_rank", "rel_extent",
    "attention_chunk_size", "local_attn_chunk_length", "lsh_attn_chunk_length",
)  # fmt: skip
_IMAGE = ("position_embedding_size", "mm_posemb_size", "nemo_conv_channels", "depthwise_separable_out_channel")

GENERIC: dict[str, Any] = {
    **dict.fromkeys(_LAYERS, LAYERS),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_WIDTH, 32),
    **dict.fromkeys(_INNER, 64),
    **dict.fromkeys(_EXPERT_INNER, 32),
    **dict.fromkeys(_HEAD_WIDTH, 8),
    **dict.fromkeys(_WINDOW, 6),
    **dict.fromkeys(_TWO, 2),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_ONE, 1),
    **dict.fromkeys(_POSITIONS, 128),
    **dict.fromkeys(_STATE, 8),
    **dict.fromkeys(_IMAGE, 32),
    **dict.fromkeys(("initializer_range", "init_std"), 0.25),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 97),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "eod_token_id": 2,
    "sep_token_id": 2,
    "unk_token_id": 3,
    "is_decoder": True,
    "use_mamba_kernels": False,
    "logit_scale": 0.8,
    "num_kv_shared_layers": 0,
    "local_attention": 12,
    "image_size": 32,
    "crop_size": 32,
    "patch_size": 8,
    "ngram_vocab_size_base": 97,
}
"""Value of each config field that a tiny model sets, wherever a config has a field of that name."""

MIXED_WITH_FULL_ATTENTION = frozenset({"sliding_attention", "chunked_attention", "linear_attention", "conv"})
"""Layer types among which, where a tiny model would have one of them alone, one full-attention layer is put."""

_HYBRID_MIX = ["hybrid_sliding", "hybrid", "hybrid_sliding"]
_CONV_MIX = ["conv", "full_attention", "conv"]
_WINDOW_PAIRS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_SHARED_MIX = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 12,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
    "head_dim": 12,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 97},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 4.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "partial_rotary_factor": 0.5,
    },
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"mlp_layer_types": ["dense", "dense", "dense"]}},
    "dots3_note_text": _DOTS3,
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": _WINDOW_PAIRS, "num_kv_shared_layers": 2},
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gpt_oss": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
            "rope_theta": 10000.0,
        }
    },
    "inkling_text": {"logits_mup_width_multiplier": 1.0, "layer_types": _HYBRID_MIX},
    "inkling2_text": {"logits_mup_width_multiplier": 1.0, "layer_types": _HYBRID_MIX},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": _CONV_MIX},
    "lfm2_moe": {"layer_types": _CONV_MIX, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"dim_model_base": 32, "scale_emb": 3},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "qwen4_exp": {
        "text_config": {
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        }
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "hash_seed": 0,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": 97,
        "shape_embed_dim": 16,
        "shape_vocab_size": 97,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": _SHARED_MIX},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": _SHARED_MIX, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1, "layer_types": _HYBRID_MIX},
}
"""What an architecture needs beside the generic values."""

UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower is a timm model, and timm is no dependency (gemma3n_text is its decoder)",
    "gemma4_assistant": "a drafter: it attends to another model's keys and values, which it cannot make itself",
    "gemma4_unified_assistant": "a drafter: it attends to another model's keys and values, which it cannot make itself",
}
"""Entries without a tiny model, and why."""
