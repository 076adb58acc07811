"""Who is served when an expert is full: against a plain loop and against Megatron."""

import math

import pytest
import torch

from moe.capacity import CapacitySettings, drop_excess, slots_per_expert

DROPS = ["probability", "position"]


def problem(rows, length, experts, per_token, *, skew=1.0, seed=0):
    """(chosen, gates) of a router that prefers some experts."""
    torch.manual_seed(seed)
    logits_NE = torch.randn(rows * length, experts) + skew * torch.arange(experts)
    gates_NK, chosen_NK = logits_NE.softmax(1).topk(per_token, dim=1)
    return chosen_NK, gates_NK


def slow_drop(chosen_NK, gates_NK, num_rows, num_experts, settings):
    length, per_token = len(chosen_NK) // num_rows, chosen_NK.shape[1]
    room = slots_per_expert(settings.factor, length, per_token, num_experts)
    table_NK = chosen_NK.clone()
    for row in range(num_rows):
        for expert in range(num_experts):
            slots = [
                (n, k)
                for n in range(row * length, (row + 1) * length)
                for k in range(per_token)
                if chosen_NK[n, k] == expert
            ]
            if settings.drop == "probability":
                slots.sort(key=lambda slot: -gates_NK[slot].item())
            for slot in slots[room:]:
                table_NK[slot] = num_experts
    return table_NK


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5])
@pytest.mark.parametrize("shape", [(3, 16, 4, 2), (2, 7, 5, 3), (1, 33, 3, 1), (5, 1, 4, 2)])
def test_equals_the_plain_loop(drop, factor, shape):
    chosen_NK, gates_NK = problem(*shape)
    chosen_NK[::5, -1] = shape[2]  # some slots go nowhere already
    settings = CapacitySettings(factor=factor, drop=drop)
    ours = drop_excess(chosen_NK, gates_NK, shape[0], shape[2], settings)
    assert torch.equal(ours, slow_drop(chosen_NK, gates_NK, shape[0], shape[2], settings))


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 4.0])
def test_one_row_equals_megatrons(drop, factor):
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    chosen_NK, gates_NK = problem(1, 64, 8, 2, skew=0.5)
    probs_NE = torch.zeros(64, 8).scatter(1, chosen_NK, gates_NK)
    policy = {"probability": "probs", "position": "position"}[drop]
    _, map_NE = moe_utils.apply_router_token_dropping(probs_NE, probs_NE > 0, 2, factor, policy)
    table_NK = drop_excess(chosen_NK, gates_NK, 1, 8, CapacitySettings(factor=factor, drop=drop))
    ours_NE = torch.zeros(64, 9, dtype=torch.bool).scatter(1, table_NK, True)[:, :8]
    if drop == "probability":
        assert torch.equal(ours_NE, map_NE)
    # By position theirs takes any of equals (a top-k of zeros and ones): as many of each expert, not always the first.
    assert torch.equal(ours_NE.sum(0), map_NE.sum(0))


def test_nobody_is_dropped_while_there_is_room():
    chosen_NK, gates_NK = problem(2, 16, 8, 2)
    for drop in DROPS:
        table_NK = drop_excess(chosen_NK, gates_NK, 2, 8, CapacitySettings(factor=4.0, drop=drop))
        assert torch.equal(table_NK, chosen_NK)


def test_all_on_one_expert_leaves_its_share():
    chosen_NK, gates_NK = torch.zeros(24, 1, dtype=torch.int64), torch.linspace(0.1, 0.9, 24)[:, None]
    first = drop_excess(chosen_NK, gates_NK, 2, 4, CapacitySettings(factor=1.0, drop="position"))
    best = drop_excess(chosen_NK, gates_NK, 2, 4, CapacitySettings(factor=1.0, drop="probability"))
    assert first.view(2, 12).tolist() == [[0] * 3 + [4] * 9] * 2
    assert best.view(2, 12).tolist() == [[4] * 9 + [0] * 3] * 2


def test_by_position_no_later_token_matters_and_by_probability_one_does():
    chosen_NK, gates_NK = problem(1, 32, 4, 2, skew=2.0)
    later_chosen, later_gates = problem(1, 32, 4, 2, skew=2.0, seed=1)
    other_chosen = torch.cat([chosen_NK[:16], later_chosen[16:]])
    other_gates = torch.cat([gates_NK[:16], later_gates[16:] + 1])
    for drop, is_causal in (("position", True), ("probability", False)):
        settings = CapacitySettings(factor=0.7, drop=drop)
        one = drop_excess(chosen_NK, gates_NK, 1, 4, settings)[:16]
        two = drop_excess(other_chosen, other_gates, 1, 4, settings)[:16]
        assert torch.equal(one, two) == is_causal


def test_equal_gates_are_served_by_position():
    chosen_NK, gates_NK = torch.zeros(8, 1, dtype=torch.int64), torch.full((8, 1), 0.5)
    table_NK = drop_excess(chosen_NK, gates_NK, 1, 2, CapacitySettings(factor=0.5))
    assert table_NK.flatten().tolist() == [0, 0, 2, 2, 2, 2, 2, 2]


def test_room_is_the_share_as_written_rounded_up():
    assert slots_per_expert(1.1, 100, 4, 8) == 55, "not 56, which binary fractions give"
    assert slots_per_expert(1.0, 7, 2, 4) == 4
    assert slots_per_expert(0.01, 4, 1, 8) == 1
    for factor in (0.3, 1.25, 2.0):
        for length in (1, 9, 128):
            share = factor * length * 2 / 8
            assert slots_per_expert(factor, length, 2, 8) in (math.ceil(share), math.ceil(share - 1e-9))


def test_no_tokens():
    empty = torch.zeros(0, 2, dtype=torch.int64)
    assert drop_excess(empty, torch.zeros(0, 2), 0, 4, CapacitySettings(factor=1.0)).shape == (0, 2)


def test_an_expert_serves_at_most_the_whole_row():
    assert slots_per_expert(1e18, 128, 2, 8) == slots_per_expert(1e300, 128, 2, 8) == 128
