"""The types of a config.json: every key that is read here, looked at once before anything is computed from one."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveFloat

from context.huggingface import RotaryKeys
from model.transformer import Depth, Width

Experts = Annotated[int, Field(ge=1, le=65_536)]
SomeLayers = Annotated[int, Field(ge=0, le=10_000)]
Token = Annotated[int, Field(ge=0, lt=2**32)]


def _as_list(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else [value]


class Keys(RotaryKeys):
    """A key that is missing or null is dealt with where it is read, as each architecture has its own meaning for it."""

    architectures: list[str] | None = None
    eos_token_id: Annotated[list[Token] | None, BeforeValidator(_as_list)] = None

    vocab_size: Width | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    num_hidden_layers: Depth | None = None
    num_nextn_predict_layers: SomeLayers | None = None
    rms_norm_eps: PositiveFloat | None = None
    initializer_range: PositiveFloat | None = None
    tie_word_embeddings: bool | None = None

    num_attention_heads: Width | None = None
    num_key_value_heads: Width | None = None
    head_dim: Width | None = None
    use_qk_norm: bool | None = None
    q_lora_rank: Width | None = None
    qk_nope_head_dim: Width | None = None
    qk_rope_head_dim: Width | None = None
    v_head_dim: Width | None = None

    sliding_window: Annotated[int, Field(ge=0)] | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Depth | None = None
    first_k_dense_replace: SomeLayers | None = None
    mlp_only_layers: list[int] | None = None
    mlp_layer_types: list[str] | None = None

    num_experts: Experts | None = None
    num_local_experts: Experts | None = None
    n_routed_experts: Experts | None = None
    num_experts_per_tok: Experts | None = None
    moe_intermediate_size: Width | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float | None = None
    n_group: Experts | None = None
    topk_group: Experts | None = None
    n_shared_experts: Annotated[int, Field(ge=0, le=65_536)] | None = None
    shared_expert_intermediate_size: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    has_selection_bias: bool | None = None
