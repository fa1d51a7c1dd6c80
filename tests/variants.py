"""Other settings of a family than its sample's, which tests walk as families of their own."""

# Every token goes to all experts: bf16's errors are attention's, not those of other choices, by
# which both the figure and its limit, one draw each, vary threefold.
ALL_CHOSEN = {"n_group": 1, "num_experts_per_tok": 8}
# a family's name and more: settings
VARIANTS = {
    # As GLM-4.5-Air; a pipeline stage of two layers has no experts.
    "glm4_moe ungrouped": {
        "n_group": 1, "first_k_dense_replace": 3, "use_qk_norm": False, "n_shared_experts": 2,
        "num_experts_per_tok": 3, "routed_scaling_factor": 1.0,
    },
    # Layers all alike, as checkpoints stack them.
    "glm4_moe grouped": {
        "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "first_k_dense_replace": 0,
        "attention_bias": False,
    },
    # As Moonlight: queries without a latent, plain rotary positions, two shared experts.
    "deepseek_v3 plain queries": ALL_CHOSEN | {
        "q_lora_rank": None, "n_shared_experts": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    # YaRN as transformers takes it without DeepSeek's factors, pairs of rotary positions in halves.
    "deepseek_v3 halves": ALL_CHOSEN | {
        "rope_interleave": False, "first_k_dense_replace": 0, "v_head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}  # fmt: skip
