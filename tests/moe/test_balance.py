"""Balance losses, the bias rule, and the numbers that are logged."""

import math

import pytest
import torch

from moe.balance import (
    RoutingMeter,
    balance_objective,
    bias_update,
    load_balance_loss,
    router_z_loss,
    update_biases,
)
from moe.layer import MoE, MoESettings
from moe.router import Router, RoutingStats, SigmoidRouterSettings, SoftmaxRouterSettings, count_rows


def routed(num_tokens=96, num_experts=8, experts_per_token=2, settings=None, seed=0):
    torch.manual_seed(seed)
    router = Router(settings or SoftmaxRouterSettings(), 16, num_experts, experts_per_token)
    torch.nn.init.normal_(router.weight)
    x_ND = torch.randn(num_tokens, 16)
    return router, x_ND, router(x_ND)


def even_stats(num_experts=6, experts_per_token=2):
    logits_NE = torch.zeros(num_experts, num_experts)
    chosen_NK = (torch.arange(num_experts)[:, None] + torch.arange(experts_per_token)) % num_experts
    gates_NK = torch.full(chosen_NK.shape, 1 / experts_per_token)
    return RoutingStats(logits_NE, logits_NE.softmax(1), chosen_NK, gates_NK, count_rows(chosen_NK, num_experts))


def summarize(all_stats: list[RoutingStats]) -> dict[str, float]:
    """What a meter reports of one forward pass."""
    meter = RoutingMeter()
    meter.add(all_stats)
    return meter.report()


@pytest.mark.parametrize("experts_per_token", [1, 2, 3, 8])
def test_balance_loss_is_hugging_faces_divided_by_k(experts_per_token):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    _, _, stats = routed(experts_per_token=experts_per_token)
    theirs = mixtral.load_balancing_loss_func((stats.logits_NE,), 8, experts_per_token)
    torch.testing.assert_close(load_balance_loss(stats), theirs / experts_per_token)


def test_balance_loss_is_1_when_even_and_e_when_all_go_to_one():
    assert load_balance_loss(even_stats()).item() == pytest.approx(1.0)
    logits_NE = torch.tensor([[40.0, 0.0, 0.0, 0.0]]).expand(10, 4)
    chosen_NK = torch.zeros(10, 1, dtype=torch.int64)
    one = RoutingStats(logits_NE, logits_NE.softmax(1), chosen_NK, torch.ones(10, 1), count_rows(chosen_NK, 4))
    assert load_balance_loss(one).item() == pytest.approx(4.0)


@pytest.mark.parametrize("settings", [SoftmaxRouterSettings(), SigmoidRouterSettings()])
def test_the_gradient_reaches_the_router_and_lowers_the_loss(settings):
    router, x_ND, stats = routed(settings=settings)
    loss = load_balance_loss(stats)
    loss.backward()
    assert router.weight.grad.norm() > 1e-3
    with torch.no_grad():
        router.weight -= 0.5 * router.weight.grad
    counts_E = stats.counts_E  # shares are constants of the loss: it is its smooth part that must fall
    assert load_balance_loss(router(x_ND), counts_E) < loss


def test_gradient_equals_that_of_the_formula():
    router, _, stats = routed()
    grad = torch.autograd.grad(load_balance_loss(stats), router.weight, retain_graph=True)[0]
    share_E = torch.nn.functional.one_hot(stats.chosen_NK, 8).double().mean(dim=(0, 1)).float()
    expected = torch.autograd.grad(8 * (share_E @ stats.logits_NE.softmax(1).mean(0)), router.weight)[0]
    torch.testing.assert_close(grad, expected)


def test_loss_of_a_step_does_not_depend_on_its_micro_batches():
    """With the whole step's counts, loss and gradient of 96 tokens are the same in 1, 2 or 5 uneven parts."""
    router, x_ND, stats = routed()
    whole = torch.autograd.grad(load_balance_loss(stats), router.weight)[0]
    for sizes in ([48, 48], [1, 50, 20, 5, 20]):
        parts = [router(x_nD) for x_nD in x_ND.split(sizes)]
        counts_E = torch.stack([part.counts_E for part in parts]).sum(0)
        assert torch.equal(counts_E, stats.counts_E)
        loss = sum(len(part.logits_NE) / 96 * load_balance_loss(part, counts_E) for part in parts)
        torch.testing.assert_close(torch.autograd.grad(loss, router.weight)[0], whole)


def test_z_loss():
    router, _, stats = routed()
    expected = torch.tensor([math.log(sum(math.exp(v) for v in row)) ** 2 for row in stats.logits_NE.tolist()]).mean()
    torch.testing.assert_close(router_z_loss(stats), expected)
    router_z_loss(stats).backward()
    assert router.weight.grad.norm() > 0


def test_objective_is_the_mean_over_layers_with_coefficients():
    settings = MoESettings(num_experts=8, experts_per_token=2, expert_width=4, z_loss=0.1)
    one, two = routed(seed=1)[2], routed(seed=2)[2]
    expected = sum(0.01 * load_balance_loss(s) + 0.1 * router_z_loss(s) for s in (one, two)) / 2
    torch.testing.assert_close(balance_objective([one, two], settings), expected)
    off = MoESettings(
        num_experts=8, experts_per_token=2, expert_width=4, router={"kind": "sigmoid"}, balance={"kind": "bias"}
    )
    assert balance_objective([one, two], off).item() == 0.0
    with pytest.raises(ValueError, match="dense"):
        balance_objective([], settings)


def test_bias_moves_against_the_load_with_mean_0():
    bias_E, counts_E = torch.tensor([0.5, 0.0, -0.5, 0.0]), torch.tensor([10, 2, 0, 0])
    new_E = bias_update(bias_E, counts_E, 0.1)
    move_E = new_E - bias_E
    torch.testing.assert_close(move_E, torch.tensor([-0.15, 0.05, 0.05, 0.05]))
    assert abs(move_E.mean().item()) < 1e-7
    torch.testing.assert_close(bias_update(bias_E, torch.full((4,), 7), 0.1), bias_E)


def test_bias_evens_out_a_lopsided_router():
    settings = MoESettings(
        num_experts=8,
        experts_per_token=2,
        expert_width=4,
        router={"kind": "sigmoid"},
        balance={"kind": "bias", "step": 0.02},
    )
    router, x_ND, stats = routed(num_tokens=512, settings=settings.router)
    x_ND = x_ND + 0.7  # a common direction makes some experts everybody's favourites
    before = summarize([router(x_ND)])["max_violation"]
    for _ in range(100):
        update_biases([router], router(x_ND).counts_E[None], settings.balance)
    assert summarize([router(x_ND)])["max_violation"] < 0.35 * before
    assert abs(router.bias_E.mean().item()) < 1e-5
    assert stats.counts_E.sum() == 1024


def test_no_bias_is_moved_when_the_loss_balances():
    router, _, stats = routed(settings=SigmoidRouterSettings())
    update_biases(
        [router], stats.counts_E[None], MoESettings(num_experts=8, experts_per_token=2, expert_width=4).balance
    )
    assert not router.bias_E.any()


def test_micro_batches_add_up_to_the_whole_batch():
    router, x_ND, stats = routed()
    whole, parts = RoutingMeter(), RoutingMeter()
    whole.add([stats, stats])
    for x_nD in x_ND.split([10, 70, 16]):
        parts.add([router(x_nD), router(x_nD)])
    assert torch.equal(whole.counts_LE, parts.counts_LE)
    assert whole.report() == pytest.approx(parts.report(), rel=1e-5)
    assert whole.report()["balance_loss"] == pytest.approx(load_balance_loss(stats).item(), rel=1e-5)
    assert whole.report()["router_z_loss"] == pytest.approx(router_z_loss(stats).item(), rel=1e-5)


def test_numbers_of_an_even_router():
    report = summarize([even_stats()])
    assert report == pytest.approx(
        {
            "balance_loss": 1.0,
            "router_z_loss": math.log(6) ** 2,
            "max_violation": 0.0,
            "dead_experts": 0,
            "router_entropy": 1.0,
        }
    )
    assert summarize([]) == {}


def test_dead_experts_and_the_worst_layer():
    chosen_NK = torch.tensor([[0, 1], [0, 2], [0, 1]])
    logits_NE = torch.randn(3, 5)
    lopsided = RoutingStats(logits_NE, logits_NE.softmax(1), chosen_NK, torch.ones(3, 2), count_rows(chosen_NK, 5))
    report = summarize([even_stats(5), lopsided])
    assert report["dead_experts"] == 2
    assert report["max_violation"] == pytest.approx(3 / (6 / 5) - 1)


def test_no_tokens_give_no_nan():
    _, _, stats = routed(num_tokens=0)
    assert load_balance_loss(stats).item() == 0.0 and router_z_loss(stats).item() == 0.0
    assert all(math.isfinite(value) for value in summarize([stats]).values())


def test_recompute_counts_once():
    """A checkpointed layer runs its forward twice; the stats that come out are those of the first."""
    layer = MoE(MoESettings(num_experts=4, experts_per_token=2, expert_width=8), 16)
    meter = RoutingMeter()
    out, stats = torch.utils.checkpoint.checkpoint(layer, torch.randn(2, 5, 16), use_reentrant=False)
    meter.add([stats])
    (out.sum() + load_balance_loss(stats)).backward()
    assert meter.counts_LE.sum() == 20
    assert layer.router.weight.grad.norm() > 0
