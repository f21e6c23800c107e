"""The sizes of the tiny models, as data."""

from typing import Any

SPECIAL_TOKENS: dict[str, int] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
    "forced_bos_token_id": 1,
    "unk_token_id": 3,
    "eod_token_id": 2,
    "sep_token_id": 2,
}
"""Ids of the tokens that configs name; every other one gets an id of its own above the ordinary tokens."""

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model", "embedding_size", "emb_dim")
_INNER = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "ffn_hidden_size")
_EXPERT_INNER = ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "original_max_position_embeddings")

GENERIC: dict[str, Any] = {
    **dict.fromkeys(_LAYERS, "layers"),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_WIDTH, 32),
    **dict.fromkeys(_INNER, 64),
    **dict.fromkeys(_EXPERT_INNER, 32),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_TOP_K, 2),
    **dict.fromkeys(_POSITIONS, 128),
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "vocab_size": 97,
    "type_vocab_size": 2,
    "is_decoder": True,
    "initializer_range": 0.25,
    "init_std": 0.25,
    "sliding_window": 6,
    "sliding_window_size": 6,
    "n_group": 1,
    "topk_group": 1,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 6,
    "query_pre_attn_scalar": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "n_mamba_heads": 2,
    "time_step_rank": 2,
    "mamba_dt_rank": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "unpadded_vocab_size": 97,
    "use_mamba_kernels": False,
}
"""Value of each config field that a tiny model sets, wherever a config has a field of that name."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.8},
    "cohere2": {"logit_scale": 0.8},
    "cohere2_moe": {"logit_scale": 0.8},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 6},
}
"""What an architecture needs beside the generic values."""

UNBUILDABLE: dict[str, str] = {}
"""Entries without a tiny model, and why."""
