"""A whole model on each rank, for a while: every bit of it, waiting for no other rank, and given up afterwards."""

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attention.attending import Attending
from attention.attention import Attention
from model.transformer import build_model
from moe.dispatch import LocalDispatcher
from moe.layer import MoE
from parallel.apply import sums_of
from parallel.layout import whole_layouts
from parallel.mesh import Grid, Mesh
from parallel.whole import fill, is_in_parts, whole_model
from parallel.world import World
from run.config import load_config
from tests.parallel.setting import CPU, TINY, Setting, this_world

MODEL = (
    "tokens_per_microbatch=128",
    "model.attention={num_heads = 4, num_kv_heads = 4, head_norms = true, sink = true}",
    "model.moe.num_shared_experts=1",
    "model.moe.shared_gate=true",
)
TOKENS_BT = torch.arange(40).view(2, 20) * 6


class Uneven(Setting):
    """No two elements of the model are alike, the routers' biases included."""

    def first_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        value = super().first_value(name, shape, seed)
        return value + torch.linspace(-0.01, 0.02, value.numel()).view(shape)


def axes_of_parts() -> Iterator[tuple[str, ...]]:
    """Every set of axes of which one leaves parts of layers on ranks."""
    size = dist.get_world_size()
    for number in (1, 2, 3):
        for axes in itertools.combinations(("shard", "expert", "context", "tensor"), number):
            fewest = 2 ** (("tensor" in axes) + bool(set(axes) - {"tensor"}))
            if {"shard", "tensor"} & set(axes) and fewest <= size:
                yield tuple(f"parallel.{axis}=2" for axis in axes)
    yield (f"parallel.shard={size}",)
    yield (f"parallel.tensor={size}",)


def case_it_is_the_model_of_one_process_to_the_bit() -> None:
    alone = Uneven(World(), *MODEL)
    expected = alone.model.state_dict()
    for axes in axes_of_parts():
        own = Uneven(this_world(), *MODEL, *axes)
        with whole_model(own.model, own.run.mesh, own.run.layouts) as model:
            assert model is not own.model
            state = model.state_dict()
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], value) for name, value in expected.items()), axes
            # Every rank by itself, and only one of them: nothing may be sent.
            if this_world().is_main:
                with torch.no_grad():
                    assert torch.equal(model.eval()(TOKENS_BT)[0], alone.model.eval()(TOKENS_BT)[0]), axes
        dist.barrier()


def case_it_is_what_the_steps_have_made_and_they_go_on_from_it() -> None:
    for axes in (("parallel.shard=2",), ("parallel.tensor=2",)):
        asked, silent = (Setting(this_world(), *MODEL, *axes) for _ in range(2))
        for number in range(3):
            ours, theirs = asked.step(number), silent.step(number)
            assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.gradient_norm, theirs.gradient_norm)
            before = asked.whole(asked.parts())
            with whole_model(asked.model, asked.run.mesh, asked.run.layouts) as model:
                assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(torch.equal(value, silent.parts()[name]) for name, value in asked.parts().items())


def case_it_reads_and_rotates_as_the_model_does() -> None:
    own = Setting(this_world(), *MODEL, "parallel.shard=2", "parallel.context=2")
    own.model.train()
    with whole_model(own.model, own.run.mesh, own.run.layouts) as model:
        assert model.training and model.rotary is own.model.rotary
        layers = list(model.modules())
        assert all(isinstance(layer.attend, Attending) for layer in layers if isinstance(layer, Attention))
        assert all(isinstance(layer.dispatcher, LocalDispatcher) for layer in layers if isinstance(layer, MoE))
    own.model.eval()
    with whole_model(own.model, own.run.mesh, own.run.layouts) as model:
        assert not model.training


def case_it_is_given_up() -> None:
    own = Setting(this_world(), *MODEL, "parallel.shard=2")
    with whole_model(own.model, own.run.mesh, own.run.layouts) as model:
        held = weakref.ref(model.embedding.weight)
        assert held() is not None
    del model
    gc.collect()
    assert held() is None


def case_ranks_that_share_experts_or_rows_alone_have_it_already() -> None:
    for axis in ("expert", "context"):
        own = Setting(this_world(), *MODEL, f"parallel.{axis}=2")
        with whole_model(own.model, own.run.mesh, own.run.layouts) as model:
            assert model is own.model


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
    ("grid", "expected"),
    [
        (Grid(8), False),
        (Grid(8, expert=4), False),
        (Grid(8, shard=2), True),
        (Grid(8, tensor=2), True),
        (Grid(8, pipeline=2, expert=2), True),
    ],
)
def test_parts_are_what_a_rank_cannot_ask_alone(grid: Grid, expected: bool) -> None:
    assert is_in_parts(Mesh(grid, World(0, 8), {})) == expected


def test_a_rank_gets_its_parts_of_whole_values() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3, device="meta"), "b": nn.BatchNorm1d(3, device="meta")})
    mesh = Mesh(Grid(), World(), {})
    layouts = whole_layouts(model)
    assert all(sums_of(layout, mesh) == () for layout in layouts.values())
    asked: list[str] = []

    def value_of(name: str, shape: torch.Size) -> Tensor:
        asked.append(name)
        return torch.full(shape, len(asked))

    fill(model, CPU, mesh, layouts, value_of)
    assert asked == [*dict(model.named_parameters()), *dict(model.named_buffers())]
    assert model["a"].weight.eq(1).all() and model["b"].running_var.eq(6).all()


def test_one_process_is_asked_itself() -> None:
    model = build_model(load_config(TINY, []).model, 257)
    with whole_model(model, Mesh(Grid(), World(), {}), whole_layouts(model)) as same:
        assert same is model
