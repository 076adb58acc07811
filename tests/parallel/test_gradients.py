"""Gradients that lie on several ranks: sums along the right axes, and a norm in which each element counts once."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.apply import sums_of
from parallel.gradients import clip_gradients, named_parameters, norm_over_ranks, sum_gradients
from parallel.layout import Layout
from parallel.mesh import Grid, Mesh, ParallelSettings, build_mesh
from parallel.world import World
from tests.parallel.setting import CPU, assert_close, this_world

WHOLE = Layout(torch.Size([5, 3]))
LAYOUTS = {
    "everywhere": WHOLE,
    "expert": WHOLE.cut("expert"),
    "tensor": Layout(torch.Size([8, 3])).cut("tensor", 0, blocks=2),
    "both": WHOLE.cut("expert", 0).cut("tensor", 1),
    "shard": WHOLE.cut("tensor", 1).cut("shard", 0),
    "expert_shard": WHOLE.cut("expert", 0).cut("expert_shard", 1),
}


def meshes() -> Iterator[Mesh]:
    """Every way of these ranks to share, but that shards are plain tensors here."""
    sets = ({}, {"expert": 2}, {"tensor": 2}, {"shard": 2}, {"expert": 2, "tensor": 2}, {"shard": 4, "expert": 2})
    for axes in sets:
        settings = ParallelSettings(**axes)
        needed = settings.tensor * max(settings.shard, settings.expert)
        if dist.get_world_size() % needed == 0:
            yield build_mesh(settings, {}, this_world(), CPU)


def parts(mesh: Mesh, values: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Parameters of which this rank has its part, whose gradients are the parts of `values`."""
    made = {}
    for name, value in values.items():
        part = LAYOUTS[name].take(value, mesh.grid, mesh.world.rank).clone()
        made[name] = nn.Parameter(torch.zeros_like(part))
        made[name].grad = part
    return made


def random_values() -> dict[str, Tensor]:
    return {name: torch.randn(layout.shape) for name, layout in LAYOUTS.items()}


def norm_of(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()]).norm()


def case_each_element_counts_once() -> None:
    for mesh in meshes():
        values = random_values()
        assert_close(str(mesh.grid), norm_over_ranks(parts(mesh, values), LAYOUTS, mesh), norm_of(values))
        # One element at a time, so that no mistake is hidden by another.
        for name in LAYOUTS:
            single = {other: torch.zeros_like(value) for other, value in values.items()}
            single[name].flatten()[4] = 3.0
            assert_close(f"{mesh.grid} {name}", norm_over_ranks(parts(mesh, single), LAYOUTS, mesh), 3.0)


def case_what_is_not_finite_on_one_rank_is_so_on_all() -> None:
    for mesh in meshes():
        for name in LAYOUTS:
            for bad in (math.inf, math.nan):
                values = random_values()
                values[name][0, 0] = bad
                norm = norm_over_ranks(parts(mesh, values), LAYOUTS, mesh)
                assert not norm.isfinite(), f"{mesh.grid} {name}: {norm}"


def case_all_ranks_clip_as_torch_does() -> None:
    for mesh in meshes():
        for most in (0.5, 1e9):
            values = random_values()
            whole = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(value)) for name, value in values.items()})
            for name, parameter in whole.items():
                parameter.grad = values[name].clone()
            nn.utils.clip_grad_norm_(whole.parameters(), most)
            own = parts(mesh, values)
            clip_gradients(own.values(), norm_over_ranks(own, LAYOUTS, mesh), most)
            for name, layout in LAYOUTS.items():
                expected = layout.take(whole[name].grad, mesh.grid, mesh.world.rank)
                assert_close(f"{mesh.grid} {name}", own[name].grad, expected)


def case_gradients_are_added_up_along_the_axes_that_are_left() -> None:
    """Of each rank a power of two of its own, so that a sum says who is in it."""
    plain = {name: layout for name, layout in LAYOUTS.items() if "shard" not in name}
    for mesh in (mesh for mesh in meshes() if mesh.grid.shard == 1):  # what shards leave, FSDP adds up
        grid, rank = mesh.grid, mesh.world.rank
        layouts = {}
        for name, layout in plain.items():
            true = replace(layout, cuts=tuple(cut for cut in layout.cuts if grid.length(cut.axis) > 1))
            layouts[name] = replace(true, sums=sums_of(true, mesh))
        own = parts(mesh, {name: torch.full(layout.shape, 2.0**rank) for name, layout in plain.items()})
        sum_gradients(own, layouts, mesh)
        for name, parameter in own.items():
            cut = {axis for axis in ("expert", "tensor") if LAYOUTS[name].is_cut(axis)}
            alike = [r for r in range(grid.size) if all(grid.place(a, r) == grid.place(a, rank) for a in cut)]
            assert parameter.grad is not None
            assert parameter.grad.eq(sum(2.0**r for r in alike)).all(), f"{grid} {name}"


def case_what_no_token_touched_counts_as_zero() -> None:
    """Or ranks would exchange different bytes; what is frozen is left alone."""
    world = this_world()
    mesh = build_mesh(ParallelSettings(), {}, world, CPU)
    layouts = dict.fromkeys("abc", Layout(torch.Size([3]), sums=("data",)))
    own = {name: nn.Parameter(torch.zeros(3), requires_grad=name != "c") for name in "abc"}
    own["b"].grad = torch.ones(3)
    if world.is_main:
        own["a"].grad = torch.ones(3)
    sum_gradients(own, layouts, mesh)
    assert own["a"].grad is not None and own["a"].grad.eq(1).all()
    assert own["b"].grad.eq(world.size).all() and own["c"].grad is None


def case_one_exchange_for_all_of_an_axis() -> None:
    mesh = build_mesh(ParallelSettings(), {}, this_world(), CPU)
    layouts = {str(number): Layout(torch.Size([2]), sums=("data",)) for number in range(5)}
    own = {name: nn.Parameter(torch.zeros(2)) for name in layouts}
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, **rest: (calls.append(tensor.numel()), all_reduce(tensor, **rest))
    try:
        sum_gradients(own, layouts, mesh)
    finally:
        dist.all_reduce = all_reduce
    assert calls == [10]


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""


ALONE = Mesh(Grid(), World(), {})


def test_one_process_clips_as_torch_does() -> None:
    for most in (0.5, 1e9):
        torch.manual_seed(0)
        ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
        theirs.load_state_dict(ours.state_dict())
        for layer in (ours, theirs):
            (100 * layer(torch.ones(2, 4))).square().sum().backward()
        layouts = {name: Layout(parameter.shape) for name, parameter in ours.named_parameters()}
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), most)
        norm = norm_over_ranks(named_parameters(ours), layouts, ALONE)
        torch.testing.assert_close(norm, expected)
        clip_gradients(ours.parameters(), norm, most)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)


def test_a_rank_without_gradients_has_nothing_to_clip() -> None:
    clip_gradients([nn.Parameter(torch.ones(2))], torch.ones(()), 1.0)


def test_names_are_plain_where_layers_are_compiled() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    wrapped = nn.Sequential(torch.compile(model[0], backend="eager"))
    assert named_parameters(wrapped).keys() == named_parameters(model).keys() == {"0.weight"}


def test_one_process_exchanges_nothing() -> None:
    model = nn.Linear(2, 2)
    layouts = {name: Layout(parameter.shape, sums=("data",)) for name, parameter in model.named_parameters()}
    sum_gradients(named_parameters(model), layouts, ALONE)
    assert model.weight.grad is None
