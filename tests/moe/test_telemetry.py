"""What is told of a step's routing: the same numbers for any cut, few of them, and right ones."""

import math

import pytest
import torch
from torch import Tensor

from moe.balance import load_balance_loss, router_z_loss
from moe.capacity import CapacitySettings
from moe.layer import MoE, MoESettings
from moe.router import Extras, NullSettings, Router, SoftmaxRouterSettings
from moe.routing import RoutingStats, TokenFacts
from moe.telemetry import RoutingMeter, choice_overlap

ALWAYS = {
    "balance_loss",
    "router_z_loss",
    "max_violation",
    "mean_violation",
    "load_variation",
    "dead_experts",
    "router_entropy",
    "router_logit_max",
    "dropped_share",
}


def stats_of(selected_NK: list[list[int]] | Tensor, logits_NE: Tensor) -> RoutingStats:
    selected_NK = torch.as_tensor(selected_NK)
    gates_NK = torch.ones(selected_NK.shape)
    return RoutingStats(logits_NE, logits_NE.softmax(1), selected_NK, selected_NK, gates_NK, logits_NE.shape[1])


def even_stats(num_experts: int = 6, k: int = 2) -> RoutingStats:
    selected_NK = (torch.arange(num_experts)[:, None] + torch.arange(k)) % num_experts
    return stats_of(selected_NK, torch.zeros(num_experts, num_experts))


def routers(count: int = 2, extras: Extras | None = None, has_bias: bool = False, num_experts: int = 8) -> list[Router]:
    torch.manual_seed(0)
    made = [
        Router(SoftmaxRouterSettings(), 16, num_experts, 2, has_bias=has_bias, extras=extras or Extras(layer=layer))
        for layer in range(count)
    ]
    for router in made:
        torch.nn.init.normal_(router.weight)
    return made


def facts_of(num_rows: int, length: int, is_real_BT: Tensor | None = None) -> TokenFacts:
    places_BT = torch.arange(length).expand(num_rows, length)
    return TokenFacts(torch.zeros(num_rows, length, dtype=torch.int64), places_BT, torch.arange(num_rows), is_real_BT)


def summarize(all_stats: list[RoutingStats]) -> dict[str, float]:
    """What a meter reports of one forward pass."""
    meter = RoutingMeter()
    meter.add(all_stats)
    return meter.report()


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    layers, x_ND = routers(), torch.randn(96, 16)
    parts = RoutingMeter()
    for x_nD in x_ND.split([10, 70, 16]):
        parts.add([router(x_nD) for router in layers])
    all_stats = [router(x_ND) for router in layers]
    whole = summarize(all_stats)
    assert whole == pytest.approx(parts.report(), rel=1e-5)
    assert whole["balance_loss"] == pytest.approx(sum(load_balance_loss(s).item() for s in all_stats) / 2, rel=1e-5)
    assert whole["router_z_loss"] == pytest.approx(sum(router_z_loss(s).item() for s in all_stats) / 2, rel=1e-5)
    assert whole["router_logit_max"] == pytest.approx(max(s.logits_NE.abs().max().item() for s in all_stats))


def test_ranks_add_up_to_the_whole_batch() -> None:
    """Their tensors are summed, the largest logit included."""
    layers, x_ND = routers(), torch.randn(96, 16)
    ranks = [RoutingMeter((), rank, 3) for rank in range(3)]
    for meter, x_nD in zip(ranks, x_ND.split([10, 70, 16]), strict=True):
        for x_mD in x_nD.split(7):
            meter.add([router(x_mD) for router in layers])
    for parts in zip(*(meter.tensors() for meter in ranks), strict=True):
        total = torch.stack(parts).sum(0)
        for part in parts:
            part.copy_(total)
    expected = summarize([router(x_ND) for router in layers])
    for meter in ranks:
        assert meter.report() == pytest.approx(expected, rel=1e-5)


def test_padding_changes_no_number() -> None:
    layers, x_BTD = routers(), torch.randn(4, 12, 16)
    is_real_BT = torch.arange(12) < torch.tensor([12, 5, 1, 8])[:, None]
    x_BTD[~is_real_BT] *= 100
    padded = summarize([router(x_BTD.flatten(0, 1), facts_of(4, 12, is_real_BT)) for router in layers])
    assert padded == pytest.approx(summarize([router(x_BTD[is_real_BT]) for router in layers]), rel=1e-5)


def test_numbers_of_an_even_router() -> None:
    report = summarize([even_stats()])
    expected = dict.fromkeys(ALWAYS, 0.0) | {
        "balance_loss": 1.0,
        "router_z_loss": math.log(6) ** 2,
        "router_entropy": 1.0,
    }
    assert report == pytest.approx(expected)
    assert summarize([]) == {} and RoutingMeter().report() == {}


def test_dead_experts_and_the_worst_layer() -> None:
    lopsided = stats_of([[0, 1], [0, 2], [0, 1]], torch.randn(3, 5))
    report = summarize([even_stats(5), lopsided])
    assert report["dead_experts"] == 2
    assert report["max_violation"] == pytest.approx(3 / (6 / 5) - 1)
    assert report["mean_violation"] == pytest.approx((3 / (6 / 5) - 1) / 2)
    deviations = [load - 6 / 5 for load in (3, 2, 1, 0, 0)]
    variation = math.sqrt(sum(d * d for d in deviations) / 5) / (6 / 5)
    assert report["load_variation"] == pytest.approx(variation / 2)


def test_null_experts_are_told_apart_from_real_ones() -> None:
    """Load is that of real experts; null ones have a share of their own."""
    stats = stats_of([[0, 4], [1, 5], [2, 4], [3, 0]], torch.zeros(4, 6))
    chosen_NK = stats.selected_NK.clamp(max=4)
    report = summarize([RoutingStats(**{**vars(stats), "num_experts": 4, "chosen_NK": chosen_NK})])
    assert report["null_share"] == pytest.approx(3 / 8)
    assert report["dropped_share"] == 0 == report["dead_experts"]
    assert report["max_violation"] == pytest.approx(2 / (5 / 4) - 1)
    layers = routers(extras=Extras(null_experts=NullSettings(count=3)))
    assert 0 < summarize([router(torch.randn(50, 16)) for router in layers])["null_share"] < 1


def test_dropped_share_is_of_what_was_wanted() -> None:
    (router,) = routers(1, Extras(capacity=CapacitySettings(factor=0.75)))
    stats = router(torch.randn(48, 16), facts_of(4, 12))
    dropped = int((stats.chosen_NK != stats.selected_NK).sum())
    assert summarize([stats])["dropped_share"] == pytest.approx(dropped / 96) and dropped > 0


def test_the_load_is_what_was_wanted_before_capacity_hid_it() -> None:
    """What moves a bias and what is told of the load."""
    (capped,), (free,) = routers(1, Extras(capacity=CapacitySettings(factor=0.5))), routers(1)
    x_ND, facts = torch.randn(48, 16), facts_of(4, 12)
    meters = RoutingMeter(), RoutingMeter()
    for meter, router in zip(meters, (capped, free), strict=True):
        meter.add([router(x_ND, facts)])
    assert meters[0].counts_LE is not None and meters[1].counts_LE is not None
    assert torch.equal(meters[0].counts_LE, meters[1].counts_LE)
    capped_report, free_report = (meter.report() for meter in meters)
    assert capped_report.pop("dropped_share") > 0.2 and free_report.pop("dropped_share") == 0
    assert capped_report == free_report


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 4), (6, 64)])
def test_the_number_of_series_does_not_grow_with_the_model(num_layers: int, num_experts: int) -> None:
    extras = Extras(null_experts=NullSettings(count=2))
    layers = routers(num_layers, extras, has_bias=True, num_experts=num_experts)
    meter, x_ND = RoutingMeter(layers), torch.randn(32, 16)
    all_stats = [router(x_ND) for router in layers]
    meter.add(all_stats)
    meter.watch(all_stats, 32, lambda: all_stats)
    assert meter.report().keys() == ALWAYS | {"null_share", "bias_min", "bias_max", "choice_overlap"}


def test_the_biases_are_those_after_the_step() -> None:
    layers = routers(has_bias=True)
    meter = RoutingMeter(layers)
    meter.add([router(torch.randn(8, 16)) for router in layers])
    for router, bias in zip(layers, (-0.25, 0.5), strict=True):
        assert router.bias_E is not None
        router.bias_E[3] = bias
    report = meter.report()
    assert (report["bias_min"], report["bias_max"]) == (-0.25, 0.5)


def test_overlap_is_the_share_of_experts_that_stay() -> None:
    first_NK = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    assert choice_overlap(first_NK, first_NK.flip(1)) == 1.0
    assert choice_overlap(first_NK, torch.tensor([[1, 0], [3, 4], [0, 1], [6, 5]])) == pytest.approx((2 + 1 + 1) / 8)
    assert choice_overlap(first_NK, (first_NK + 2) % 8) == 0.0
    assert choice_overlap(first_NK[:0], first_NK[:0]) == 0.0


def test_overlap_leaves_out_empty_slots_and_tokens_without_any() -> None:
    a_NK, b_NK = torch.tensor([[0, 8], [8, 8], [1, 2]]), torch.tensor([[0, 3], [8, 8], [8, 1]])
    expected = (1 / 2 + 1 / 2) / 2
    assert choice_overlap(a_NK, b_NK, 8) == pytest.approx(expected)
    assert choice_overlap(b_NK, a_NK, 8) == pytest.approx(expected)
    assert choice_overlap(a_NK, b_NK[:, :1], 8) == pytest.approx((1 + 0) / 2)


def test_overlap_is_of_the_first_tokens_with_the_weights_of_the_report() -> None:
    (router,) = routers(1)
    x_ND = torch.randn(64, 16)
    meter, before = RoutingMeter([router]), router(x_ND)
    meter.add([before])
    meter.watch([before], 20, lambda: [router(x_ND[:20])])
    assert meter.report()["choice_overlap"] == 1.0
    torch.nn.init.normal_(router.weight)
    after_NK = router(x_ND[:20]).selected_NK
    expected = sum(len({*a} & {*b}) / 2 for a, b in zip(before.selected_NK.tolist(), after_NK.tolist(), strict=False))
    assert 0 < meter.report()["choice_overlap"] < 1
    assert meter.report()["choice_overlap"] == pytest.approx(expected / 20)


def test_no_tokens_give_no_nan() -> None:
    report = summarize([routers(1)[0](torch.randn(0, 16))])
    assert report.keys() == ALWAYS and all(math.isfinite(value) for value in report.values())


def test_recompute_counts_once() -> None:
    """A checkpointed layer runs its forward twice; the stats that come out are those of the first."""
    layer = MoE(MoESettings(num_experts=4, experts_per_token=2, expert_width=8), 16)
    meter = RoutingMeter()
    out, stats = torch.utils.checkpoint.checkpoint(layer, torch.randn(2, 5, 16), use_reentrant=False)
    meter.add([stats])
    (out.sum() + load_balance_loss(stats)).backward()
    assert meter.counts_LE is not None and meter.counts_LE.sum() == 20
    assert layer.router.weight.grad.norm() > 0
