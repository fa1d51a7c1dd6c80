"""Other settings of a family than its sample's, which tests walk as families of their own."""

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
}  # fmt: skip
