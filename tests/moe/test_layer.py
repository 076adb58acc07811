"""The whole layer: what must not change it, and what it equals."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moe.experts import MATMULS as ALL_MATMULS
from moe.experts import unavailable
from moe.layer import MoE, MoESettings
from moe.routing import Memo, TokenFacts

MATMULS = [name for name in ALL_MATMULS if unavailable(name, "cpu", torch.float32, 16, 24) is None]
SCORES = ("softmax", "sigmoid", "sqrt_softplus")
ROUTERS = [{"kind": kind, "normalize": normalize} for kind in SCORES for normalize in (True, False)]


def build(num_experts=4, experts_per_token=2, width=16, expert_width=24, **others):
    torch.manual_seed(0)
    layer = MoE(
        MoESettings(num_experts=num_experts, experts_per_token=experts_per_token, expert_width=expert_width, **others),
        width,
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer


def gradients(layer, x_BTD, grad_BTD):
    """Output and gradients of the tokens and of every parameter; those of router.weight go through the gates."""
    x_BTD = x_BTD.detach().requires_grad_()
    out_BTD, _ = layer(x_BTD)
    named = dict(layer.named_parameters())
    grads = torch.autograd.grad(out_BTD, [x_BTD, *named.values()], grad_BTD)
    return {"out": out_BTD.detach(), **dict(zip(["x", *named], grads, strict=True))}


def slow_layer(layer, x_ND, facts=None):
    """Every expert on every token, weighted by gates that are 0 where it was not chosen."""
    stats = layer.router(x_ND, facts)
    num_experts = stats.num_experts
    gates_NE = x_ND.new_zeros(len(x_ND), num_experts + 1).scatter(1, stats.chosen_NK, stats.gates_NK)[:, :num_experts]
    gate, up = torch.einsum("nd,ejd->enj", x_ND, layer.experts.gate_up).chunk(2, dim=-1)
    answers_END = torch.einsum("enf,edf->end", F.silu(gate) * up, layer.experts.down)
    out_ND = torch.einsum("ne,end->nd", gates_NE, answers_END)
    out_ND = out_ND if stats.copy_N is None else out_ND + stats.copy_N[:, None] * x_ND
    return out_ND if layer.shared is None else out_ND + layer.shared(x_ND)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("shape", [(4, 2), (5, 1), (3, 3), (7, 4)])
@pytest.mark.parametrize("experts", ["auto", *MATMULS])
def test_equals_every_expert_on_every_token(router, shape, experts):
    if shape[1] == 1 and router["normalize"]:
        pytest.skip("refused by the settings")
    layer = build(*shape, router=router, experts=experts, num_shared_experts=1)
    x_BTD, grad_BTD = torch.randn(3, 7, 16), torch.randn(3, 7, 16)
    ours = gradients(layer, x_BTD, grad_BTD)
    x_ND = x_BTD.flatten(0, 1).requires_grad_()
    out_ND = slow_layer(layer, x_ND)
    expected = torch.autograd.grad(out_ND, [x_ND, *layer.parameters()], grad_BTD.flatten(0, 1))
    torch.testing.assert_close(ours["out"].flatten(0, 1), out_ND.detach(), rtol=1e-4, atol=1e-5)
    for name, theirs in zip(["x", *dict(layer.named_parameters())], expected, strict=True):
        torch.testing.assert_close(
            ours[name].view_as(theirs), theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_gradcheck_through_the_loop():
    layer = build(3, 2, width=4, expert_width=3, experts="loop").double()
    names = [name for name, _ in layer.named_parameters()]
    x_BTD = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)

    def through(x_BTD, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x_BTD,))[0]

    assert torch.autograd.gradcheck(through, (x_BTD, *(p.detach().requires_grad_() for p in layer.parameters())))


def test_equal_experts_are_one_dense_feed_forward():
    layer = build(6, 3)
    with torch.no_grad():
        layer.experts.gate_up[:] = layer.experts.gate_up[0].clone()
        layer.experts.down[:] = layer.experts.down[0].clone()
    x_BTD = torch.randn(2, 9, 16)
    gate, up = F.linear(x_BTD, layer.experts.gate_up[0]).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x_BTD)[0], F.linear(F.silu(gate) * up, layer.experts.down[0]))


@pytest.mark.parametrize("experts", MATMULS)
def test_renaming_experts_changes_nothing(experts):
    layer, other = build(5, 2, experts=experts), build(5, 2, experts=experts)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        other.router.weight.copy_(layer.router.weight[order])
        other.experts.gate_up.copy_(layer.experts.gate_up[order])
        other.experts.down.copy_(layer.experts.down[order])
    x_BTD, grad_BTD = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    one, two = gradients(layer, x_BTD, grad_BTD), gradients(other, x_BTD, grad_BTD)
    torch.testing.assert_close(one["out"], two["out"])
    torch.testing.assert_close(one["x"], two["x"])
    torch.testing.assert_close(one["experts.down"][order], two["experts.down"])
    torch.testing.assert_close(one["router.weight"][order], two["router.weight"])


@pytest.mark.parametrize("experts", MATMULS)
def test_tokens_do_not_see_each_other(experts):
    layer = build(5, 2, experts=experts)
    x_BTD = torch.randn(1, 30, 16)
    order = torch.randperm(30)
    torch.testing.assert_close(layer(x_BTD[:, order])[0], layer(x_BTD)[0][:, order])
    torch.testing.assert_close(layer(x_BTD[:, :4])[0], layer(x_BTD)[0][:, :4])


@pytest.mark.parametrize("experts", MATMULS)
def test_all_tokens_on_one_expert(experts):
    layer = build(5, 1, experts=experts, router={"kind": "sigmoid", "normalize": False}, balance={"kind": "bias"})
    layer.router.bias_E[2] = 100.0
    x_BTD, grad_BTD = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    assert layer(x_BTD)[1].counts_E.tolist() == [0, 0, 16, 0, 0]
    grads = gradients(layer, x_BTD, grad_BTD)
    assert all(torch.isfinite(g).all() for g in grads.values())
    used_E = grads["experts.down"].flatten(1).norm(dim=1) > 0
    assert used_E.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("experts", MATMULS)
def test_no_tokens(experts):
    grads = gradients(build(experts=experts, num_shared_experts=1), torch.randn(0, 7, 16), torch.randn(0, 7, 16))
    assert grads["out"].shape == (0, 7, 16)
    assert not any(g.any() for name, g in grads.items())


def test_low_precision_error_is_at_most_twice_the_plain_twins():
    layer = build(8, 2, width=64, expert_width=64)
    x_BTD, grad_BTD = torch.randn(2, 64, 64), torch.randn(2, 64, 64)
    exact = gradients(build(8, 2, width=64, expert_width=64, experts="loop"), x_BTD, grad_BTD)

    def under_autocast(experts):
        layer.experts.matmul = experts
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(layer, x_BTD, grad_BTD.bfloat16())

    plain = under_autocast("loop")
    for experts in MATMULS:
        for name, ours in under_autocast(experts).items():
            error = (ours.float() - exact[name]).norm() / exact[name].norm()
            assert error <= 2 * (plain[name].float() - exact[name]).norm() / exact[name].norm(), name


FEATURES = {
    "expert_choice": {"router": {"kind": "expert_choice"}},
    "random": {"router": {"kind": "random"}, "balance": []},
    "null_zero": {"null_experts": {"count": 3}},
    "null_copy": {"null_experts": {"count": 3, "output": "copy"}, "num_shared_experts": 1},
    "capacity": {"capacity": {"factor": 0.7}},
    "shared_gate": {"num_shared_experts": 2, "shared_gate": True},
    "all": {
        "router": {"kind": "sqrt_softplus", "jitter": 0.1, "scale": 2.0},
        "null_experts": {"count": 2, "output": "copy"},
        "capacity": {"factor": 0.7, "drop": "position"},
        "num_shared_experts": 1,
        "shared_gate": True,
        "balance": [{"kind": "bias"}, {"kind": "loss"}],
    },
}


def facts_of(rows, length, padding=0):
    torch.manual_seed(1)
    is_real_BT = torch.arange(length).expand(rows, -1) < length - padding
    places_BT = torch.arange(length).expand(rows, -1)
    return TokenFacts(torch.randint(50, (rows, length)), places_BT, torch.randint(1 << 40, (rows,)), is_real_BT)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("experts", MATMULS)
def test_every_feature_equals_every_expert_on_every_token(name, padding, experts):
    layer, facts = build(**FEATURES[name], experts=experts), facts_of(3, 8, padding)
    x_BTD, grad_BTD = torch.randn(3, 8, 16).requires_grad_(), torch.randn(3, 8, 16)
    inputs = [x_BTD, *layer.parameters()]
    out_BTD, stats = layer(x_BTD, facts)
    slow_BTD = slow_layer(layer, x_BTD.flatten(0, 1), facts).view(3, 8, 16)
    torch.testing.assert_close(out_BTD, slow_BTD, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out, inputs, grad_BTD) for out in (out_BTD, slow_BTD))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        assert one.norm() > 0
    assert stats.num_experts == 4 and len(stats.counts_E) == 4


def test_a_token_that_meets_no_expert_gets_the_shared_ones_alone():
    layer = build(num_shared_experts=1)
    out_BTD, _ = layer(x_BTD := torch.randn(2, 8, 16), facts_of(2, 8, padding=3))
    torch.testing.assert_close(out_BTD[:, 5:], layer.shared(x_BTD)[:, 5:])
    assert not torch.allclose(out_BTD[:, :5], layer.shared(x_BTD)[:, :5])


@pytest.mark.parametrize("padding", [0, 3])
def test_expert_choice_tells_experts_how_few_rows_there_are(padding):
    layer, facts, told = build(num_experts=8, **FEATURES["expert_choice"]), facts_of(3, 10, padding), []
    layer.experts.register_forward_pre_hook(lambda _, args: told.append(args[3]))
    _, stats = layer(torch.randn(3, 10, 16), facts)
    assert told == [3 * 8 * 3] and stats.chosen_NK.numel() == 30 * 8
    assert stats.counts_E.sum() == told[0]
    build()(torch.randn(3, 10, 16), facts)
    build(**FEATURES["capacity"])(torch.randn(3, 10, 16), facts)
    assert layer.router.eval().max_rows(facts) is None


def test_layers_draw_each_for_themselves():
    settings = MoESettings(num_experts=8, experts_per_token=2, expert_width=4, router={"kind": "random"}, balance=[])
    x_BTD, facts = torch.randn(2, 64, 16), facts_of(2, 64)
    one, same, other = (MoE(settings, 16, layer)(x_BTD, facts)[1].selected_NK for layer in (0, 0, 1))
    assert torch.equal(one, same) and (one == other).float().mean() < 0.3


def test_recomputing_inside_the_experts_is_passed_on():
    assert build(recompute="up").experts.recompute_up and not build().experts.recompute_up


def test_a_router_that_is_told_nothing_says_so():
    for name in ("expert_choice", "random", "capacity"):
        with pytest.raises(AssertionError, match="pass TokenFacts"):
            build(**FEATURES[name])(torch.randn(1, 4, 16))


@pytest.mark.parametrize("name", FEATURES)
def test_recomputation_meets_the_same_experts_whatever_its_router_says(name):
    """A router that is noisier the second time would send other rows to other experts: a CheckpointError."""
    layer, facts = build(**FEATURES[name]), facts_of(3, 8, 2)
    x_BTD = torch.randn(3, 8, 16, requires_grad=True)
    tables = []
    layer.router.register_forward_pre_hook(lambda _, args: (args[0] + torch.randn_like(args[0]), *args[1:]))
    layer.router.register_forward_hook(lambda _, __, stats: tables.append(stats.chosen_NK))
    out_BTD, stats = checkpoint(layer, x_BTD, facts, Memo(), use_reentrant=False, preserve_rng_state=False)
    out_BTD.square().sum().backward()
    assert len(tables) == 2 and torch.equal(*tables) and torch.equal(tables[0], stats.chosen_NK)
    assert x_BTD.grad.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("name", FEATURES)
def test_recomputation_changes_no_gradient(name):
    layer, facts = build(**FEATURES[name]), facts_of(3, 8, 2)
    x_BTD = torch.randn(3, 8, 16, requires_grad=True)
    inputs = [x_BTD, *layer.parameters()]
    plain, stats = layer(x_BTD, facts)
    again, first = checkpoint(layer, x_BTD, facts, Memo(), use_reentrant=False)
    weight_NK = torch.randn_like(stats.gates_NK)
    losses = [out.square().sum() + (s.gates_NK * weight_NK).sum() for out, s in ((plain, stats), (again, first))]
    for ours, theirs in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        assert torch.equal(ours, theirs)


def test_builds_on_the_meta_device_and_names_its_parameters():
    with torch.device("meta"):
        settings = MoESettings(
            num_experts=4,
            experts_per_token=2,
            expert_width=8,
            num_shared_experts=2,
            shared_gate=True,
            null_experts={"count": 3},
        )
        layer = MoE(settings, 16)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "router.weight": (7, 16),
        "experts.gate_up": (4, 16, 16),
        "experts.down": (4, 16, 8),
        "shared.gate_up.weight": (32, 16),
        "shared.down.weight": (16, 16),
        "shared.gate.weight": (1, 16),
    }
