"""Whole blocks against those of published models, as the transformers library has them."""

import importlib

import pytest
import torch

from moe.layer import MoE, MoESettings

transformers = pytest.importorskip("transformers")


def build(num_experts=4, experts_per_token=2, width=16, expert_width=24, **others):
    torch.manual_seed(0)
    layer = MoE(
        MoESettings(num_experts=num_experts, experts_per_token=experts_per_token, expert_width=expert_width, **others),
        width,
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer


def test_equals_mixtrals_block():
    mixtral = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    layer = build(8, 2, width=16, expert_width=24)
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    theirs = mixtral.MixtralSparseMoeBlock(config)
    theirs.gate.weight.data.copy_(layer.router.weight)
    theirs.experts.gate_up_proj.data.copy_(layer.experts.gate_up)
    theirs.experts.down_proj.data.copy_(layer.experts.down)
    x_BTD = torch.randn(3, 11, 16)
    torch.testing.assert_close(layer(x_BTD)[0], theirs(x_BTD), rtol=1e-4, atol=1e-5)


def test_equals_qwen2s_block_with_its_gated_shared_expert():
    qwen2 = importlib.import_module("transformers.models.qwen2_moe.modeling_qwen2_moe")
    layer = build(8, 2, router={"kind": "softmax", "normalize": False}, num_shared_experts=2, shared_gate=True)
    config = transformers.Qwen2MoeConfig(
        hidden_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
        norm_topk_prob=False,
    )
    config._experts_implementation = "eager"
    theirs = qwen2.Qwen2MoeSparseMoeBlock(config)
    gate, up = layer.shared.gate_up.weight.chunk(2)
    for parameter, ours in (
        (theirs.gate.weight, layer.router.weight),
        (theirs.experts.gate_up_proj, layer.experts.gate_up),
        (theirs.experts.down_proj, layer.experts.down),
        (theirs.shared_expert.gate_proj.weight, gate),
        (theirs.shared_expert.up_proj.weight, up),
        (theirs.shared_expert.down_proj.weight, layer.shared.down.weight),
        (theirs.shared_expert_gate.weight, layer.shared.gate.weight),
    ):
        parameter.data.copy_(ours)
    x_BTD = torch.randn(3, 11, 16)
    torch.testing.assert_close(layer(x_BTD)[0], theirs(x_BTD), rtol=1e-4, atol=1e-5)


def test_equals_longcat_flashs_block_with_its_experts_that_copy():
    longcat = importlib.import_module("transformers.models.longcat_flash.modeling_longcat_flash")
    router = {"kind": "softmax", "normalize": False, "scale": 6.0}
    layer = build(6, 3, router=router, null_experts={"count": 2, "output": "copy"}, balance={"kind": "bias"})
    layer.router.bias_E.copy_(torch.randn(8) / 10)
    config = transformers.LongcatFlashConfig(
        hidden_size=16, n_routed_experts=6, zero_expert_num=2, moe_topk=3, expert_ffn_hidden_size=24,
        routed_scaling_factor=6.0,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = longcat.LongcatFlashMoE(config)
    theirs.router.classifier.weight.data.copy_(layer.router.weight)
    theirs.router.e_score_correction_bias.copy_(layer.router.bias_E)
    theirs.experts.gate_up_proj.data[:6].copy_(layer.experts.gate_up)
    theirs.experts.down_proj.data.copy_(layer.experts.down)
    x_BTD = torch.randn(3, 11, 16)
    torch.testing.assert_close(layer(x_BTD)[0], theirs(x_BTD), rtol=1e-4, atol=1e-5)
