"""Models of every architecture: those that it has to hold."""

GROUPED = {"num_heads": 4, "num_kv_heads": 2}
NORMS = {**GROUPED, "head_norms": True}
WINDOW = {"window": 9}
MOE = {"num_experts": 6, "experts_per_token": 2, "expert_width": 12}
ALONE = {"kind": "sigmoid", "scale": 2.5}
LATENT = {
    "kind": "latent",
    "num_heads": 4,
    "latent_rank": 12,
    "nope_channels": 6,
    "rope_channels": 8,
    "value_channels": 5,
}
DENSE_FIRST = {"num_dense_layers": 1, "feed_forward_width": 40}
FEED_FORWARD = {"feed_forward_width": 40}
GROUPS = {"count": 3, "keep": 2}
BIAS = [{"kind": "bias"}]
SHARED = {"num_shared_experts": 2}

# What each architecture has to hold: at least two models, plain and with all that it may have.
CASES: dict[str, list[dict]] = {
    "LlamaForCausalLM": [
        {"attention": GROUPED, **FEED_FORWARD},
        {"attention": {**GROUPED, "channels": 6}, **FEED_FORWARD, "tied_embeddings": True, "norm_epsilon": 1e-3},
    ],
    "MistralForCausalLM": [
        {"attention": {**GROUPED, **WINDOW}, "pattern": ["window"], **FEED_FORWARD},
        {"attention": {"num_heads": 3, "num_kv_heads": 1, "channels": 8}, **FEED_FORWARD, "tied_embeddings": True},
    ],
    "Qwen3ForCausalLM": [
        {"attention": NORMS, **FEED_FORWARD},
        {"attention": {**NORMS, **WINDOW}, "pattern": ["window", "full"], **FEED_FORWARD, "tied_embeddings": True},
        {"attention": {**NORMS, **WINDOW, "channels": 10}, "pattern": ["window"], **FEED_FORWARD},
        {"attention": NORMS, **FEED_FORWARD, "norm_epsilon": 1e-2},
    ],
    "SmolLM3ForCausalLM": [
        {"attention": GROUPED, "pattern": ["full", "full_nope"], **FEED_FORWARD},
        {"attention": GROUPED, "pattern": ["full_nope"], **FEED_FORWARD, "tied_embeddings": True},
        {"attention": {**GROUPED, **WINDOW}, "pattern": ["window", "full_nope", "window_nope"], **FEED_FORWARD},
    ],
    "MixtralForCausalLM": [
        {"attention": GROUPED, "moe": MOE},
        {"attention": {**GROUPED, **WINDOW}, "pattern": ["window"], "moe": MOE, "tied_embeddings": True},
    ],
    "Qwen3MoeForCausalLM": [
        {"attention": NORMS, "moe": MOE},
        {
            "attention": {**NORMS, **WINDOW, "channels": 10},
            "pattern": ["window"],
            "moe": {**MOE, "router": {"normalize": False}},
            **DENSE_FIRST,
        },
    ],
    "MellumForCausalLM": [
        {"attention": {**NORMS, **WINDOW}, "pattern": ["window", "full"], "moe": MOE},
        {
            "attention": {**NORMS, **WINDOW},
            "pattern": ["window", "window", "full"],
            "moe": {**MOE, "router": {"normalize": False}},
            **DENSE_FIRST,
            "tied_embeddings": True,
        },
    ],
    "Qwen2MoeForCausalLM": [
        {"attention": GROUPED, "moe": {**MOE, **SHARED, "shared_gate": True}},
        {
            "attention": {**GROUPED, **WINDOW},
            "pattern": ["window", "full"],
            "moe": {**MOE, **SHARED, "shared_gate": True, "router": {"normalize": False}},
            **DENSE_FIRST,
        },
    ],
    "Glm4MoeForCausalLM": [
        {"attention": GROUPED, "moe": {**MOE, "router": {"kind": "sigmoid"}}},
        {"attention": NORMS, "moe": {**MOE, **SHARED, "router": {**ALONE, "groups": GROUPS}, "balance": BIAS}},
        {"attention": NORMS, "moe": {**MOE, "router": {**ALONE, "normalize": False}, "balance": BIAS}, **DENSE_FIRST},
    ],
    "Dots1ForCausalLM": [
        {"attention": {**NORMS, **WINDOW}, "pattern": ["window", "full"], "moe": {**MOE, "router": ALONE}},
        {
            "attention": {**NORMS, **WINDOW},
            "pattern": ["window"],
            "moe": {**MOE, **SHARED, "router": {**ALONE, "groups": GROUPS}, "balance": BIAS},
            **DENSE_FIRST,
        },
    ],
    "DeepseekV3ForCausalLM": [
        {"attention": LATENT, **FEED_FORWARD},
        {"attention": {**LATENT, "query_rank": 10}, "moe": {**MOE, "router": ALONE}, "norm_epsilon": 1e-3},
        {
            "attention": {**LATENT, "query_rank": 10},
            "moe": {**MOE, **SHARED, "router": {**ALONE, "groups": GROUPS}, "balance": BIAS},
            **DENSE_FIRST,
        },
    ],
}  # fmt: skip
