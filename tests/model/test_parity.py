"""Logits against transformers' models on the same random weights."""

import pytest
import torch
from torch import Tensor

from context.rotary import DefaultRotary
from model.initialize import initialize
from model.transformer import ModelSettings, Transformer, build_model
from settings import validate

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "attn_implementation": "eager",
    "tie_word_embeddings": False,
}
OURS = {"num_layers": 3, "width": 64, "attention": {"num_heads": 4, "num_kv_heads": 2}, "initial_std": 0.1}
ATTENTION = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
}
LATENT_ATTENTION = {
    "query_down": "q_a_proj",
    "query_norm": "q_a_layernorm",
    "query": "q_b_proj",
    "latent": "kv_a_proj_with_mqa",
    "latent_norm": "kv_a_layernorm",
    "expand": "kv_b_proj",
    "output": "o_proj",
}
EXPERTS = {"num_experts": 6, "experts_per_token": 2, "expert_width": 40}


def our_model(**changes: object) -> Transformer:
    model = build_model(validate({**OURS, **changes}, ModelSettings, "parity"), SHAPE["vocab_size"])
    initialize(model, 0, "cpu")
    model.use_rotary(DefaultRotary(base=10_000.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def their_weights(ours: dict[str, Tensor], num_layers: int = 3) -> dict[str, Tensor]:
    """Our parameters under transformers' names."""
    theirs = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": ours["norm.weight"]}
    theirs["lm_head.weight"] = ours["head.weight"]
    for layer in range(num_layers):
        us, them = f"blocks.{layer}.", f"model.layers.{layer}."
        theirs[them + "input_layernorm.weight"] = ours[us + "attention_norm.weight"]
        theirs[them + "post_attention_layernorm.weight"] = ours[us + "feed_forward_norm.weight"]
        names = LATENT_ATTENTION if us + "attention.latent.weight" in ours else ATTENTION
        for our_name, their_name in names.items():
            if f"{us}attention.{our_name}.weight" in ours:
                theirs[f"{them}self_attn.{their_name}.weight"] = ours[f"{us}attention.{our_name}.weight"]
        if us + "feed_forward.router.weight" in ours:
            theirs[them + "mlp.gate.weight"] = ours[us + "feed_forward.router.weight"]
            theirs[them + "mlp.experts.gate_up_proj"] = ours[us + "feed_forward.experts.gate_up"]
            theirs[them + "mlp.experts.down_proj"] = ours[us + "feed_forward.experts.down"]
        else:
            gate, up = ours[us + "feed_forward.gate_up.weight"].chunk(2)
            theirs[them + "mlp.gate_proj.weight"], theirs[them + "mlp.up_proj.weight"] = gate, up
            theirs[them + "mlp.down_proj.weight"] = ours[us + "feed_forward.down.weight"]
    return theirs


def assert_equal_logits_and_gradients(ours: Transformer, theirs: torch.nn.Module) -> None:
    theirs.load_state_dict(their_weights(ours.state_dict()), strict=True)
    theirs.train()
    tokens = torch.randint(SHAPE["vocab_size"], (2, 50), generator=torch.Generator().manual_seed(1))
    hidden, _ = ours(tokens)
    our_logits = hidden @ ours.head_weight.T
    their_logits = theirs(tokens).logits
    assert our_logits.std() > 0.3
    assert (our_logits - their_logits).abs().max() <= 1e-5

    upstream = torch.randn(our_logits.shape, generator=torch.Generator().manual_seed(2))
    (our_logits * upstream).sum().backward()
    (their_logits * upstream).sum().backward()
    our_gradients = their_weights({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        error = (our_gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error <= 2e-5, name


def test_dense_equals_llama() -> None:
    ours = our_model(feed_forward_width=96)
    assert_equal_logits_and_gradients(ours, transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)))


def test_experts_equal_mixtral() -> None:
    ours = our_model(moe=EXPERTS)
    shape = {**SHAPE, "intermediate_size": 40, "num_local_experts": 6, "num_experts_per_tok": 2}
    assert_equal_logits_and_gradients(ours, transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape)))


def test_windows_equal_mixtral_with_a_sliding_window() -> None:
    ours = our_model(moe=EXPERTS, pattern=["window"], attention={"num_heads": 4, "num_kv_heads": 2, "window": 7})
    shape = {**SHAPE, "intermediate_size": 40, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 7}
    assert_equal_logits_and_gradients(ours, transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape)))


def test_head_norms_and_free_channels_equal_qwen3() -> None:
    attention = {"num_heads": 4, "num_kv_heads": 2, "channels": 24, "head_norms": True}
    ours = our_model(moe=EXPERTS, attention=attention)
    shape = {**SHAPE, "head_dim": 24, "moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 2}
    config = transformers.Qwen3MoeConfig(**shape, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])
    assert_equal_logits_and_gradients(ours, transformers.Qwen3MoeForCausalLM(config))


def test_latent_attention_equals_deepseek_v3() -> None:
    sizes = {"query_rank": 20, "latent_rank": 24, "nope_channels": 10, "rope_channels": 6, "value_channels": 12}
    ours = our_model(feed_forward_width=96, attention={"kind": "latent", "num_heads": 4, **sizes})
    config = transformers.DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4},
        first_k_dense_replace=3,
        q_lora_rank=20,
        kv_lora_rank=24,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=12,
        rope_interleave=False,
        num_mtp_layers=0,
    )
    assert_equal_logits_and_gradients(ours, transformers.DeepseekV3ForCausalLM(config))
