"""Balance losses over groups of rows, the bias rules, and what their settings refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.balance import (
    BiasBalanceSettings,
    LossBalanceSettings,
    balance_objective,
    bias_update,
    count_by_row,
    load_balance_loss,
    router_z_loss,
    rows_per_group,
    update_biases,
)
from moe.layer import MoESettings
from moe.router import Router, RouterSettings, SigmoidRouterSettings, SoftmaxRouterSettings
from moe.routing import RoutingStats, TokenFacts
from settings import Refusal, validate

SHAPE = {"num_experts": 8, "experts_per_token": 2, "expert_width": 4}


def settings_of(**changes: Any) -> MoESettings:
    """MoE settings as a configuration would give them."""
    return validate({**SHAPE, **changes}, MoESettings, "model.moe")


def routed(
    num_tokens: int = 96, num_experts: int = 8, k: int = 2, settings: RouterSettings | None = None, **extra: Any
) -> tuple[Router, Tensor, RoutingStats]:
    torch.manual_seed(0)
    router = Router(settings or SoftmaxRouterSettings(), 16, num_experts, k, **extra)
    torch.nn.init.normal_(router.weight)
    x_ND = torch.randn(num_tokens, 16)
    return router, x_ND, router(x_ND)


def stats_of(selected_NK: Tensor, logits_NE: Tensor, **changes: Any) -> RoutingStats:
    """The stats of a router that wanted, and got, the experts given."""
    gates_NK = torch.ones(selected_NK.shape)
    plain = RoutingStats(logits_NE, logits_NE.softmax(1), selected_NK, selected_NK, gates_NK, logits_NE.shape[1])
    return RoutingStats(**{**vars(plain), **changes})


def even_stats(num_experts: int = 6, k: int = 2) -> RoutingStats:
    selected_NK = (torch.arange(num_experts)[:, None] + torch.arange(k)) % num_experts
    return stats_of(selected_NK, torch.zeros(num_experts, num_experts))


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_balance_loss_is_hugging_faces_divided_by_k(k: int) -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    _, _, stats = routed(k=k)
    theirs = mixtral.load_balancing_loss_func((stats.logits_NE,), 8, k)
    torch.testing.assert_close(load_balance_loss(stats), theirs / k)


def test_balance_loss_is_hugging_faces_with_padding() -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    router, x_ND, _ = routed()
    is_real_BT = torch.arange(12).expand(8, 12) < torch.tensor([12, 9, 12, 1, 7, 12, 12, 11])[:, None]
    facts = TokenFacts(torch.zeros(8, 12, dtype=torch.int64), torch.arange(12).expand(8, 12), None, is_real_BT)
    stats = router(x_ND, facts)
    theirs = mixtral.load_balancing_loss_func((stats.logits_NE,), 8, 2, attention_mask=is_real_BT)
    torch.testing.assert_close(load_balance_loss(stats), theirs / 2)


def test_balance_loss_is_1_when_even_and_e_when_all_go_to_one() -> None:
    assert load_balance_loss(even_stats()).item() == pytest.approx(1.0)
    logits_NE = torch.tensor([[40.0, 0.0, 0.0, 0.0]]).expand(10, 4)
    one = stats_of(torch.zeros(10, 1, dtype=torch.int64), logits_NE)
    assert load_balance_loss(one).item() == pytest.approx(4.0)


@pytest.mark.parametrize("settings", [SoftmaxRouterSettings(), SigmoidRouterSettings()])
def test_the_gradient_reaches_the_router_and_lowers_the_loss(settings: RouterSettings) -> None:
    router, x_ND, stats = routed(settings=settings)
    loss = load_balance_loss(stats)
    loss.backward()
    assert router.weight.grad is not None and router.weight.grad.norm() > 1e-3
    with torch.no_grad():
        router.weight -= 0.5 * router.weight.grad
    # Shares are constants of the loss: it is its smooth part that must fall.
    assert load_balance_loss(router(x_ND), stats.selected_E[None]) < loss


def test_gradient_equals_that_of_the_formula() -> None:
    router, _, stats = routed()
    grad = torch.autograd.grad(load_balance_loss(stats), router.weight, retain_graph=True)[0]
    share_E = torch.nn.functional.one_hot(stats.selected_NK, 8).double().mean(dim=(0, 1)).float()
    expected = torch.autograd.grad(8 * (share_E @ stats.logits_NE.softmax(1).mean(0)), router.weight)[0]
    torch.testing.assert_close(grad, expected)


def test_what_was_wanted_is_counted_whatever_was_dropped() -> None:
    """Capacity must not hide the overload that it cuts off."""
    _, _, stats = routed()
    dropped = RoutingStats(**{**vars(stats), "chosen_NK": stats.chosen_NK.where(stats.chosen_NK != 3, 8)})
    assert dropped.counts_E[3] == 0 < stats.counts_E[3]
    settings = settings_of(balance=[{"kind": "loss"}, {"kind": "loss", "scope": "sequence"}])
    assert torch.equal(balance_objective([dropped], settings, 4), balance_objective([stats], settings, 4))


def test_counts_by_row_add_up_and_leave_out_what_wanted_nothing() -> None:
    _, _, stats = routed()
    assert torch.equal(count_by_row(stats, 12).sum(0), stats.selected_E)
    expected = torch.nn.functional.one_hot(stats.selected_NK.view(12, 16), 8).sum(1)
    assert torch.equal(count_by_row(stats, 12), expected)
    gaps = stats_of(torch.tensor([[0, 3], [3, 3], [1, 0], [3, 2]]), torch.zeros(4, 3))
    assert torch.equal(count_by_row(gaps, 2), torch.tensor([[1, 0, 0], [1, 1, 1]]))


def test_the_sequence_loss_is_the_mean_of_the_rows_losses() -> None:
    """DeepSeek-V3, equations 17 to 20, with f_i of the top-k choices over the T tokens of a row."""
    _, _, stats = routed()
    settings = settings_of(balance={"kind": "loss", "scope": "sequence", "coefficient": 0.3})
    f_BE = 8 / (2 * 24) * torch.nn.functional.one_hot(stats.selected_NK.view(4, 48), 8).sum(1)
    p_BE = stats.logits_NE.softmax(1).view(4, 24, 8).mean(1)
    torch.testing.assert_close(balance_objective([stats], settings, 4), 0.3 * (f_BE * p_BE).sum(1).mean())


def test_one_row_or_one_group_makes_all_scopes_the_same() -> None:
    _, _, stats = routed()
    whole = balance_objective([stats], settings_of())
    for loss in ({"scope": "sequence"}, {"scope": "microbatch", "tokens": 96}):
        assert torch.equal(balance_objective([stats], settings_of(balance=loss | {"kind": "loss"})), whole)


def test_z_loss() -> None:
    router, _, stats = routed()
    expected = torch.tensor([math.log(sum(math.exp(v) for v in row)) ** 2 for row in stats.logits_NE.tolist()]).mean()
    torch.testing.assert_close(router_z_loss(stats), expected)
    router_z_loss(stats).backward()
    assert router.weight.grad is not None and router.weight.grad.norm() > 0


def test_objective_is_the_mean_over_layers_with_coefficients() -> None:
    settings = settings_of(z_loss=0.1, balance=[{"kind": "loss"}, {"kind": "bias"}])
    one, two = routed()[2], routed(settings=SigmoidRouterSettings())[2]
    expected = sum(0.01 * load_balance_loss(s) + 0.1 * router_z_loss(s) for s in (one, two)) / 2
    torch.testing.assert_close(balance_objective([one, two], settings), expected)
    assert balance_objective([one, two], settings_of(balance={"kind": "bias"})).item() == 0.0
    with pytest.raises(ValueError, match="dense"):
        balance_objective([], settings)


@pytest.mark.parametrize(
    ("loss", "rows"),
    [
        ({"scope": "batch"}, 12),
        ({"scope": "sequence"}, 1),
        ({"scope": "microbatch", "tokens": 128}, 2),
        ({"scope": "microbatch", "tokens": 64}, 1),
        ({"scope": "microbatch", "tokens": 6400}, 12),
    ],
)
def test_groups_are_whole_rows(loss: dict[str, Any], rows: int) -> None:
    assert rows_per_group(LossBalanceSettings(**loss), num_rows=12, sequence_length=64) == rows


def test_a_group_of_a_broken_row_is_refused() -> None:
    with pytest.raises(Refusal, match=r"tokens=100 must be a multiple of sequence_length=64.*try tokens=128"):
        rows_per_group(LossBalanceSettings(scope="microbatch", tokens=100), num_rows=12, sequence_length=64)


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        ({"kind": "loss", "scope": "microbatch"}, 'scope="microbatch" needs tokens'),
        ({"kind": "loss", "tokens": 128}, 'tokens=128 means nothing for scope="batch"'),
        ({"kind": "loss", "scope": "sequence", "tokens": 128}, 'tokens=128 means nothing for scope="sequence"'),
        ([{"kind": "bias"}, {"kind": "bias", "rule": "proportional"}], "2 rules are a bias; leave one of them"),
        ([{"kind": "loss"}, {"kind": "loss", "coefficient": 0.5}], '2 rules are a loss of scope="batch"; leave'),
        (
            [{"kind": "loss", "scope": "microbatch", "tokens": 128}] * 3,
            '3 rules are a loss of scope="microbatch" and tokens=128',
        ),
        ({"kind": "loss", "scope": "step"}, "scope"),
    ],
)
def test_rules_that_mean_nothing_are_refused(balance: Any, expected: str) -> None:
    with pytest.raises(Refusal, match=expected):
        settings_of(balance=balance)


def test_rules_are_one_table_or_a_list() -> None:
    assert settings_of().balance == (LossBalanceSettings(),)
    assert settings_of(balance={"kind": "bias", "step": 0.5}).balance == (BiasBalanceSettings(step=0.5),)
    both = [{"kind": "loss", "scope": "microbatch", "tokens": t} for t in (64, 128)] + [{"kind": "bias"}]
    assert len(settings_of(balance=both).balance) == 3
    assert MoESettings(**SHAPE, balance=[LossBalanceSettings(), BiasBalanceSettings()]).has_bias
    assert settings_of(balance=[]).balance == ()


@pytest.mark.parametrize(
    ("rule", "moves"), [("sign", [-0.15, 0.05, 0.05, 0.05]), ("proportional", [-7 / 30, 1 / 30, 0.1, 0.1])]
)
def test_bias_moves_against_the_load_with_mean_0(rule: str, moves: list[float]) -> None:
    bias_E, counts_E = torch.tensor([0.5, 0.0, -0.5, 0.0]), torch.tensor([10, 2, 0, 0])
    move_E = bias_update(bias_E, counts_E, 0.1, rule) - bias_E
    torch.testing.assert_close(move_E, torch.tensor(moves))
    assert abs(move_E.mean().item()) < 1e-7
    for even in (0, 7):  # a step of nothing but padding moves nothing either
        assert torch.equal(bias_update(bias_E, torch.full((4,), even), 0.1, rule), bias_E)


def test_a_proportional_move_is_of_the_load_and_not_of_the_number_of_tokens() -> None:
    counts_E = torch.tensor([10, 2, 0, 4])
    once, often = (bias_update(torch.zeros(4), n * counts_E, 0.1, "proportional") for n in (1, 1000))
    torch.testing.assert_close(once, often)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_bias_evens_out_a_lopsided_router(rule: str) -> None:
    rules = settings_of(balance={"kind": "bias", "rule": rule, "step": 0.02}).balance
    router, x_ND, _ = routed(num_tokens=512, settings=SigmoidRouterSettings(), has_bias=True)
    x_ND = x_ND + 0.7  # a common direction makes some experts everybody's favourites
    before_E = router(x_ND).selected_E
    for _ in range(100):
        update_biases([router], router(x_ND).selected_E[None], rules)
    after_E = router(x_ND).selected_E
    assert after_E.max() / 128 - 1 < 0.35 * (before_E.max() / 128 - 1)
    assert router.bias_E is not None and abs(router.bias_E.mean().item()) < 1e-5


def test_no_bias_is_moved_when_losses_balance() -> None:
    router, _, stats = routed(has_bias=True)
    update_biases([router], stats.selected_E[None], settings_of().balance)
    assert router.bias_E is not None and not router.bias_E.any()


def test_no_tokens_give_no_nan() -> None:
    _, _, stats = routed(num_tokens=0)
    assert load_balance_loss(stats).item() == 0.0 and router_z_loss(stats).item() == 0.0
