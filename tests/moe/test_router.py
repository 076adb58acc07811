"""Who is chosen and how much it counts, against formulas written out and against transformers."""

import pytest
import torch

from moe.layer import MoESettings
from moe.router import Router, SigmoidRouterSettings, SoftmaxRouterSettings, count_rows

KINDS = [SoftmaxRouterSettings, SigmoidRouterSettings]


def build(settings, num_experts=8, experts_per_token=2, width=16, std=1.0):
    torch.manual_seed(0)
    router = Router(settings, width, num_experts, experts_per_token)
    torch.nn.init.normal_(router.weight, std=std)
    return router, torch.randn(64, width)


def test_softmax_router_equals_mixtrals():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    router, x_ND = build(SoftmaxRouterSettings())
    theirs = mixtral.MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=2))
    theirs.weight.data.copy_(router.weight.data)
    logits_NE, gates_NK, chosen_NK = theirs(x_ND)
    stats = router(x_ND)
    assert torch.equal(stats.chosen_NK, chosen_NK)
    torch.testing.assert_close(stats.gates_NK, gates_NK)
    torch.testing.assert_close(stats.logits_NE, logits_NE)


def test_sigmoid_gates_are_the_scores_of_the_chosen_over_their_sum():
    router, x_ND = build(SigmoidRouterSettings(scale=2.5))
    stats = router(x_ND)
    chosen_scores = torch.sigmoid(stats.logits_NE).gather(1, stats.chosen_NK)
    torch.testing.assert_close(stats.gates_NK, 2.5 * chosen_scores / chosen_scores.sum(1, keepdim=True))
    scores_NE = torch.sigmoid(stats.logits_NE)
    torch.testing.assert_close(stats.probabilities_NE, scores_NE / scores_NE.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gates_left_alone_are_the_scores_themselves(kind):
    router, x_ND = build(kind(normalize=False))
    stats = router(x_ND)
    all_scores = {"softmax": stats.logits_NE.softmax(1), "sigmoid": stats.logits_NE.sigmoid()}[kind().kind]
    torch.testing.assert_close(stats.gates_NK, all_scores.gather(1, stats.chosen_NK))


@pytest.mark.parametrize("kind", KINDS)
def test_vanishing_scores_still_share_out_the_whole(kind):
    """Scores below any epsilon must not shrink the gates: the router could hide from the balance loss there."""
    router, x_ND = build(kind(), std=0.0)
    stats = Router.forward(router, x_ND)
    torch.testing.assert_close(stats.gates_NK, torch.full_like(stats.gates_NK, 0.5))
    router.weight.data[:] = -60.0
    stats = router(torch.ones(4, 16))
    torch.testing.assert_close(stats.gates_NK.sum(1), torch.ones(4))
    torch.testing.assert_close(stats.probabilities_NE.sum(1), torch.ones(4))


def test_bias_chooses_but_never_weighs():
    router, x_ND = build(SigmoidRouterSettings())
    before = router(x_ND)
    router.bias_E[3] = 10.0
    after = router(x_ND)
    assert (after.chosen_NK[:, 0] == 3).all() and not (before.chosen_NK[:, 0] == 3).all()
    scores_NK = torch.sigmoid(after.logits_NE).gather(1, after.chosen_NK)
    torch.testing.assert_close(after.gates_NK, scores_NK / scores_NK.sum(1, keepdim=True))
    assert torch.equal(after.probabilities_NE, before.probabilities_NE)


def test_only_the_sigmoid_router_has_a_bias_and_it_is_saved():
    assert "bias_E" in build(SigmoidRouterSettings())[0].state_dict()
    assert "bias_E" not in build(SoftmaxRouterSettings())[0].state_dict()


def test_routing_is_fp32_under_autocast():
    router, x_ND = build(SoftmaxRouterSettings())
    plain = router(x_ND)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x_ND)
    assert torch.equal(plain.logits_NE, cast.logits_NE)
    assert cast.gates_NK.dtype == torch.float32
    assert router.to(torch.bfloat16)(x_ND.bfloat16()).gates_NK.dtype == torch.float32


def test_counts():
    chosen_NK = torch.tensor([[0, 3], [3, 1], [3, 0]])
    assert count_rows(chosen_NK, 5).tolist() == [2, 1, 0, 3, 0]
    assert count_rows(chosen_NK[:0], 5).tolist() == [0] * 5


def test_settings_refuse_what_cannot_learn():
    with pytest.raises(ValueError, match=r"experts_per_token=9 .* num_experts=8"):
        MoESettings(num_experts=8, experts_per_token=9, expert_width=4)
    with pytest.raises(ValueError, match=r"router\.normalize=false"):
        MoESettings(num_experts=8, experts_per_token=1, expert_width=4)
    with pytest.raises(ValueError, match=r'router\.kind="sigmoid"'):
        MoESettings(num_experts=8, experts_per_token=2, expert_width=4, balance={"kind": "bias"})
