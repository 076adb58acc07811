"""Ranks that share experts give the numbers of one rank that holds them all: gradients, steps, checkpoints.

The cases run on 2 and 4 gloo ranks (tests/ranks.py); each rank also computes the whole of it by itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.dispatch import LocalDispatcher
from moe.exchange import Exchange
from moe.layer import MoE, MoESettings
from moe.routing import Memo, RoutingStats
from parallel.apply import sums_of
from parallel.experts import check_experts, split_experts
from parallel.gradients import named_parameters, norm_over_ranks, sum_gradients
from parallel.layout import Layout, whole_layouts
from parallel.mesh import Grid, Mesh, ParallelSettings, build_mesh
from parallel.whole import fill
from parallel.world import World
from run.config import load_config
from settings import Refusal
from tests.parallel.setting import CPU, TINY, Setting, assert_close, this_world

SMALL = ("tokens_per_microbatch=128", "model.moe.num_shared_experts=1")
STEPS = {
    "bias": SMALL,
    "losses, recomputed": (
        *SMALL,
        "model.moe.balance=[{kind='loss',coefficient=0.5},{kind='loss',scope='sequence',coefficient=0.5}]",
        "model.moe.z_loss=0.1",
        "recompute=true",
    ),
    "null experts and a capacity": (
        *SMALL,
        "model.moe.num_experts=8",
        "model.moe.capacity={factor=0.75}",
        "model.moe.null_experts={count=2}",
        "recompute=true",
    ),
    "muon, two layers": (
        *SMALL,
        "model.num_dense_layers=0",
        "model.moe.router={kind='softmax'}",
        "model.moe.balance=[{kind='bias'},{kind='loss'}]",
        "optimizer.kind=muon",
    ),
}


def sharing() -> Iterator[int]:
    """The ways in which the ranks can share experts."""
    return (expert for expert in (2, 4) if dist.get_world_size() % expert == 0)


def own_part(whole: Tensor, name: str, setting: Setting) -> Tensor:
    """What this rank holds of a whole tensor of the model."""
    return setting.run.layouts[name].take(whole, setting.run.mesh.grid, setting.run.world.rank)


def moments(setting: Setting) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in named_parameters(setting.model).items()}
    return {
        f"{names[parameter]}.{key}": value
        for optimizer in setting.optimizer.optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def share(model: nn.Module, mesh: Mesh) -> dict[str, Layout]:
    """Leave a model's own experts on this rank, with the values they have, and say how all of it lies."""
    values = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    model.to("meta")
    layouts = whole_layouts(model)
    split_experts(model, mesh, layouts)
    for name, layout in layouts.items():
        layouts[name] = replace(layout, sums=sums_of(layout, mesh))
    fill(model, CPU, mesh, layouts, lambda name, shape: values[name])
    return layouts


def case_a_layer_is_that_of_one_rank() -> None:
    """Tokens of uneven number, none on one rank; skewed routing; with and without recomputation."""
    world = this_world()
    counts = [5, 0, 3, 8][: world.size]
    settings = MoESettings(num_experts=8, experts_per_token=3, expert_width=8, num_shared_experts=1)
    x_RTD = [torch.randn(1, count, 16) for count in counts]
    grad_RTD = [torch.randn(1, count, 16) for count in counts]

    def run(layer: MoE, x_BTD: Tensor, grad_BTD: Tensor, recompute: bool) -> tuple[dict[str, Tensor], RoutingStats]:
        layer.zero_grad()
        x_BTD = x_BTD.clone().requires_grad_()
        inputs = (x_BTD, None, Memo())
        out, stats = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        stats.gates_NK.retain_grad()
        (out * grad_BTD).sum().add(stats.probabilities_NE.square().sum()).backward()
        assert x_BTD.grad is not None and stats.gates_NK.grad is not None
        return {"out": out[0].detach(), "x": x_BTD.grad[0], "gates": stats.gates_NK.grad}, stats

    def build() -> MoE:
        torch.manual_seed(1)
        layer = MoE(settings, 16)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():
            layer.router.weight[:2] *= 0.01
            layer.router.weight[5:] = layer.router.weight[5]  # ties
        return layer

    for expert in sharing():
        for recompute in (False, True):
            whole, own = build(), build()
            mesh = build_mesh(ParallelSettings(expert=expert), {}, world, CPU)
            own_layouts = share(model := nn.ModuleDict({"layer": own}), mesh)
            theirs, their_stats = run(whole, torch.cat(x_RTD, dim=1), torch.cat(grad_RTD, dim=1), recompute)
            ours, our_stats = run(own, x_RTD[world.rank], grad_RTD[world.rank], recompute)
            sum_gradients(named_parameters(model), own_layouts, mesh)
            for name, expected in theirs.items():
                assert_close(name, ours[name], expected.split(counts)[world.rank])
            for field in ("logits_NE", "probabilities_NE", "gates_NK"):
                expected = getattr(their_stats, field).split(counts)[world.rank]
                assert_close(field, getattr(our_stats, field), expected)
            assert torch.equal(our_stats.chosen_NK, their_stats.chosen_NK.split(counts)[world.rank])
            for (name, parameter), expected in zip(own.named_parameters(), whole.parameters(), strict=True):
                assert parameter.untyped_storage().nbytes() == parameter.nbytes, f"{name} keeps the whole alive"
                assert parameter.grad is not None and expected.grad is not None
                assert_close(
                    name, parameter.grad, own_layouts[f"layer.{name}"].take(expected.grad, mesh.grid, world.rank)
                )
            expected = nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None])
            assert_close("norm", norm_over_ranks(named_parameters(model), own_layouts, mesh), expected)


def case_a_step_is_that_of_one_rank() -> None:
    """Gradients, norm, losses, counts and the bias move, through the loop's own step."""
    for title, overrides in STEPS.items():
        whole = Setting(World(), *overrides)
        whole.optimizer.step = lambda: None  # type: ignore[method-assign]
        theirs = whole.step(0)
        numbers = theirs.routing.report()
        assert numbers["max_violation"] > 0.4, "the load is meant to be uneven"
        for expert in sharing():
            own = Setting(this_world(), *overrides, f"parallel.expert={expert}")
            own.optimizer.step = lambda: None  # type: ignore[method-assign]
            ours = own.step(0)
            assert_close(f"{title}: loss", ours.loss, theirs.loss)
            assert_close(f"{title}: norm", ours.gradient_norm, theirs.gradient_norm, 2e-6)
            ours_numbers = ours.routing.report()
            for name in numbers.keys() - {"choice_overlap"}:  # which tells of this rank's own tokens
                assert_close(f"{title}: {name}", ours_numbers[name], numbers[name], 2e-6)
            for name, expected in whole.model.named_parameters():
                parameter = own.model.get_parameter(name)
                assert parameter.grad is not None and expected.grad is not None, name
                # After clipping, whose factor carries the norm's rounding.
                assert_close(f"{title}: {name}", parameter.grad, own_part(expected.grad, name, own), 5e-6)
            for name, expected in whole.model.named_buffers():
                assert_close(f"{title}: {name}", own.model.get_buffer(name), expected)


def case_steps_go_on_like_those_of_one_rank() -> None:
    overrides = STEPS["muon, two layers"]
    whole = Setting(World(), *overrides)
    losses = [float(whole.step(step).loss) for step in range(4)]
    for expert in sharing():
        own = Setting(this_world(), *overrides, f"parallel.expert={expert}")
        for step, expected in enumerate(losses):
            assert_close(f"loss of step {step}", own.step(step).loss, expected, 1e-5)
        layers = [module for module in own.model.modules() if isinstance(module, MoE)]
        assert all(len(layer.experts.down) == 4 // expert for layer in layers)
        sizes = {name: state.shape[0] for name, state in moments(own).items() if "experts.down.exp_avg" in name}
        assert set(sizes.values()) == {4 // expert}, "moments are kept of own experts alone"


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""


@pytest.mark.parametrize(
    ("expert", "num_experts", "expected"),
    [
        (4, 6, r"model.moe.num_experts=6 must be divisible by parallel.expert=4; try parallel.expert=3 or .*=8"),
        (5, 8, r"try parallel.expert=4 or model.moe.num_experts=10"),
        (2, None, r"parallel.expert=2 shares experts, but the model has none"),
    ],
)
def test_experts_that_cannot_be_shared_are_refused(expert: int, num_experts: int | None, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_experts(ParallelSettings(expert=expert), num_experts)


def test_the_configuration_refuses_them_by_name() -> None:
    with pytest.raises(Refusal, match=r"model.moe.num_experts=4 must be divisible by parallel.expert=3; try "):
        load_config(TINY, ["parallel.expert=3"])
    with pytest.raises(Refusal, match=r"parallel\.expert"):
        load_config(TINY, ["parallel.expert=0"])
    assert load_config(TINY, ["parallel.expert=4"]).parallel.expert == 4


@pytest.mark.parametrize(
    ("expert", "size", "expected"),
    [
        (2, 1, r"parallel.expert=2 does not divide the 1 ranks of this run; start 2 of them .*parallel.expert=1"),
        (2, 5, r"start 4 of them \(torchrun --nproc-per-node 4\) or set parallel.expert=1"),
        (4, 6, r"start 4 of them .* or set parallel.expert=3"),
    ],
)
def test_ranks_that_do_not_divide_into_groups_are_refused(expert: int, size: int, expected: str) -> None:
    with pytest.raises(Refusal, match=expected):
        build_mesh(ParallelSettings(expert=expert), {}, World(0, size), CPU)


def test_without_shared_experts_nothing_changes() -> None:
    layer = MoE(MoESettings(num_experts=4, experts_per_token=2, expert_width=8), 16)
    before: dict[str, Any] = dict(layer.named_parameters())
    layouts = whole_layouts(layer)
    split_experts(nn.ModuleDict({"layer": layer}), Mesh(Grid(3), World(0, 3), {}), layouts)
    assert layouts == whole_layouts(layer)
    assert isinstance(layer.dispatcher, LocalDispatcher) and not isinstance(layer.dispatcher, Exchange)
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())
