"""The whole layer: what must not change it, and what it equals."""

import pytest
import torch
import torch.nn.functional as F

from moe.experts import MATMULS
from moe.layer import MoE, MoESettings

ROUTERS = [{"kind": kind, "normalize": normalize} for kind in ("softmax", "sigmoid") for normalize in (True, False)]


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


def slow_layer(layer, x_ND):
    """Every expert on every token, weighted by gates that are 0 where it was not chosen."""
    stats = layer.router(x_ND)
    gates_NE = torch.zeros_like(stats.logits_NE).scatter(1, stats.chosen_NK, stats.gates_NK)
    gate, up = torch.einsum("nd,ejd->enj", x_ND, layer.experts.gate_up).chunk(2, dim=-1)
    answers_END = torch.einsum("enf,edf->end", F.silu(gate) * up, layer.experts.down)
    out_ND = torch.einsum("ne,end->nd", gates_NE, answers_END)
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
    layer = build(5, 1, experts=experts, router={"kind": "sigmoid", "normalize": False})
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
    for experts in ("blocked", "grouped_mm"):
        for name, ours in under_autocast(experts).items():
            error = (ours.float() - exact[name]).norm() / exact[name].norm()
            assert error <= 2 * (plain[name].float() - exact[name]).norm() / exact[name].norm(), name


def test_equals_mixtrals_block():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    layer = build(8, 2, width=16, expert_width=24)
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    theirs = mixtral.MixtralSparseMoeBlock(config)
    theirs.gate.weight.data.copy_(layer.router.weight)
    theirs.experts.gate_up_proj.data.copy_(layer.experts.gate_up)
    theirs.experts.down_proj.data.copy_(layer.experts.down)
    x_BTD = torch.randn(3, 11, 16)
    torch.testing.assert_close(layer(x_BTD)[0], theirs(x_BTD), rtol=1e-4, atol=1e-5)


def test_builds_on_the_meta_device_and_names_its_parameters():
    with torch.device("meta"):
        layer = MoE(MoESettings(num_experts=4, experts_per_token=2, expert_width=8, num_shared_experts=2), 16)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "router.weight": (4, 16),
        "experts.gate_up": (4, 16, 16),
        "experts.down": (4, 16, 8),
        "shared.gate_up.weight": (32, 16),
        "shared.down.weight": (16, 16),
    }
