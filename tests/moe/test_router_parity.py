"""Routers against those of published models, as the transformers library has them."""

import pytest
import torch
from pydantic import TypeAdapter

from moe.router import Extras, NullSettings, Router, RouterSettings

transformers = pytest.importorskip("transformers")
WIDTH = 16
SOFTMAX = {
    "mixtral": ("MixtralConfig", "MixtralTopKRouter", "num_local_experts"),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeTopKRouter", "num_experts"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeTopKRouter", "num_experts"),
    "olmoe": ("OlmoeConfig", "OlmoeTopKRouter", "num_experts"),
}


def build(kind="softmax", num_experts=16, experts_per_token=4, has_bias=False, extras=None, **changes):
    torch.manual_seed(0)
    settings = TypeAdapter(RouterSettings).validate_python({"kind": kind, **changes})
    router = Router(settings, WIDTH, num_experts, experts_per_token, has_bias=has_bias, extras=extras or Extras())
    torch.nn.init.normal_(router.weight)
    return router, torch.randn(64, WIDTH)


def theirs(model, config, router, **options):
    """Their router of this name with our weight."""
    options = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_experts_per_tok": 4, **options}
    module = __import__(f"transformers.models.{model}.modeling_{model}", fromlist=[router])
    return getattr(module, router)(getattr(transformers, config)(**options))


def same_experts_and_gates(stats, gates_NK, chosen_NK):
    """Whatever order a token's experts stand in."""
    shape = stats.logits_NE.shape
    ours = torch.zeros(shape).scatter(1, stats.chosen_NK, stats.gates_NK)
    torch.testing.assert_close(ours, torch.zeros(shape).scatter(1, chosen_NK, gates_NK))
    assert torch.equal(stats.chosen_NK.sort(1).values, chosen_NK.sort(1).values)


@pytest.mark.parametrize("model", SOFTMAX)
@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_before_or_after_top_k(model, normalize):
    config, name, count = SOFTMAX[model]
    if model == "mixtral" and not normalize:
        pytest.skip("Mixtral always normalizes")
    other = theirs(model, config, name, **{count: 16}, **({} if model == "mixtral" else {"norm_topk_prob": normalize}))
    router, x_ND = build(normalize=normalize)
    other.weight.data.copy_(router.weight.data)
    logits_NE, gates_NK, chosen_NK = other(x_ND)
    stats = router(x_ND)
    assert torch.equal(stats.chosen_NK, chosen_NK)
    torch.testing.assert_close(stats.gates_NK, gates_NK)
    torch.testing.assert_close(stats.logits_NE, logits_NE)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("count", "keep"), [(4, 2), (2, 1), (8, 3)])
def test_sigmoid_with_groups_and_bias_is_deepseek_v3s(normalize, count, keep):
    options = {"n_group": count, "topk_group": keep, "norm_topk_prob": normalize, "routed_scaling_factor": 2.5}
    other = theirs("deepseek_v3", "DeepseekV3Config", "DeepseekV3TopkRouter", n_routed_experts=16, **options)
    groups = {"count": count, "keep": keep, "score": "top2"}
    router, x_ND = build("sigmoid", has_bias=True, normalize=normalize, scale=2.5, groups=groups)
    other.weight.data.copy_(router.weight.data)
    for bias_E in (torch.zeros(16), torch.randn(16), -torch.rand(16) - 1):
        router.bias_E.copy_(bias_E)
        other.e_score_correction_bias.copy_(bias_E)
        _, gates_NK, chosen_NK = other(x_ND)
        same_experts_and_gates(router(x_ND), gates_NK, chosen_NK)


def test_softmax_with_groups_is_deepseek_v2s():
    options = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}
    other = theirs("deepseek_v2", "DeepseekV2Config", "DeepseekV2TopkRouter", n_routed_experts=16, **options)
    groups = {"count": 4, "keep": 2, "score": "max"}
    router, x_ND = build("softmax", normalize=False, scale=16.0, groups=groups)
    other.weight.data.copy_(router.weight.data)
    _, gates_NK, chosen_NK = other(x_ND)
    same_experts_and_gates(router(x_ND), gates_NK, chosen_NK)


def test_sqrt_softplus_with_bias_is_deepseek_v4s():
    pytest.importorskip("transformers.models.deepseek_v4")
    options = {"n_routed_experts": 16, "routed_scaling_factor": 1.5}
    other = theirs("deepseek_v4", "DeepseekV4Config", "DeepseekV4TopKRouter", **options)
    router, x_ND = build("sqrt_softplus", has_bias=True, scale=1.5)
    other.weight.data.copy_(router.weight.data)
    router.bias_E.copy_(torch.randn(16))
    other.e_score_correction_bias.copy_(router.bias_E)
    _, gates_NK, chosen_NK = other(x_ND)
    same_experts_and_gates(router(x_ND), gates_NK, chosen_NK)


def test_softmax_with_null_experts_and_bias_is_longcat_flashs():
    options = {"moe_topk": 4, "n_routed_experts": 12, "zero_expert_num": 4, "routed_scaling_factor": 6.0}
    other = theirs("longcat_flash", "LongcatFlashConfig", "LongcatFlashTopkRouter", **options)
    nulls = Extras(null_experts=NullSettings(count=4, output="copy"))
    router, x_ND = build("softmax", 12, has_bias=True, extras=nulls, normalize=False, scale=6.0)
    other.classifier.weight.data.copy_(router.weight.data)
    router.bias_E.copy_(torch.randn(16) / 10)
    other.e_score_correction_bias.copy_(router.bias_E)
    _, gates_NK, chosen_NK = other(x_ND)
    stats = router(x_ND)
    is_null_NK = chosen_NK >= 12
    assert 0 < is_null_NK.sum() < is_null_NK.numel()
    assert torch.equal(stats.selected_NK.sort(1).values, chosen_NK.sort(1).values)
    torch.testing.assert_close(stats.copy_N, gates_NK.where(is_null_NK, 0.0).sum(1))
    torch.testing.assert_close(stats.gates_NK.sum(1), gates_NK.where(~is_null_NK, 0.0).sum(1))
