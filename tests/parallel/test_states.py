"""What a rank is said to hold is what it holds: weights and moments to the byte, all that is alive to a tenth."""

import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.kept import Numbers
from model.memory import Memory, memory
from model.transformer import build_model
from parallel.gradients import named_parameters
from parallel.layout import local
from parallel.mesh import Grid, grid_of
from parallel.states import layouts_on, states_by_stage
from run.config import RunConfig, load_config
from run.microbatches import forward, loss_of
from run.needs import shares_of
from tests.parallel.setting import TINY, Setting, this_world

MODEL = (
    "tokens_per_step=2048",
    "tokens_per_microbatch=512",
    "total_tokens=16384",
    "context.stages=[{until_tokens=16384,sequence_length=64,rotary={kind='default',base=1e4}}]",
    "model.num_layers=3",
    "model.width=32",
    "model.attention.num_kv_heads=2",
    "model.moe.num_shared_experts=1",
    "evals={}",
)
GRIDS = [
    dict(zip(("shard", "expert", "tensor"), lengths, strict=True))
    for lengths in itertools.product((1, 2, 4), (1, 2, 4), (1, 2))
]
ON_RANKS = {2: ("shard", "expert", "tensor", "context"), 4: ("shard expert", "shard tensor", "expert tensor")}
CPU = Numbers(4, "cpu")


class Living(TorchDispatchMode):
    """The bytes of tensors alive that were made inside, by what their storage has now: sharding empties some."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.storages: dict[int, weakref.ReferenceType[Any]] = {}
        self.peak = 0

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for ref in self.storages.values() if (storage := ref()) is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := local(leaf).untyped_storage())._cdata not in self.known:
                self.storages[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, self.bytes)
        return result


def told_of(config: RunConfig, size: int) -> Memory:
    """What arithmetic says of the first rank."""
    step = config.stages[0].longest_step()
    share = replace(next(iter(shares_of(config, 257, step, size, CPU))), has_earlier=True)
    return memory(config.model, 257, config.optimizer.kind, share)


def settings_on_ranks() -> Iterable[tuple[str, Setting]]:
    for axes in ON_RANKS[dist.get_world_size()]:
        yield axes, Setting(this_world(), *MODEL, *(f"parallel.{axis}=2" for axis in axes.split()))


def case_parts_are_to_the_byte() -> None:
    for axes, setting in settings_on_ranks():
        config, grid = setting.config, setting.run.mesh.grid
        model = build_model(config.model, setting.model.vocab_size)
        assert layouts_on(model, grid) == setting.run.layouts, axes
        setting.step(0)
        (states,) = states_by_stage(config.model, setting.model.vocab_size, "adamw", grid)
        parameters = named_parameters(setting.model).values()
        moments = [
            local(value)
            for inner in setting.optimizer.optimizers
            for state in inner.state.values()
            for value in state.values()
        ]
        if dist.get_rank() == 0:  # which has the larger parts
            assert sum(local(parameter).nbytes for parameter in parameters) == states.weights, axes
            assert sum(moment.nbytes for moment in moments) == states.moments, axes


def case_what_is_alive_is_to_a_tenth() -> None:
    for axes, setting in settings_on_ranks():
        setting.step(0)
        model, told = setting.model, told_of(setting.config, dist.get_world_size())
        batch = setting.microbatches(1)[0]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        known = [*map(local, model.state_dict().values()), *map(local, model.parameters()), *gradients]
        known += [value for value in vars(batch).values() if isinstance(value, Tensor)]
        with Living(known) as alive:
            hidden_BTD, stats = forward(model, batch, setting.run, None)
            kept = alive.bytes
            loss_of(model, hidden_BTD, batch, setting.run).weighted.backward()
        del stats
        peak = told.states + alive.peak
        assert abs(kept / told.activations - 1) <= 0.1, (axes, kept, told)
        assert abs(told.total / peak - 1) <= 0.1, (axes, peak, told)


@pytest.mark.parametrize("axes", GRIDS, ids=str)
def test_parts_make_the_whole_once(axes: dict[str, int]) -> None:
    if max(axes["shard"], axes["expert"]) % min(axes["shard"], axes["expert"]):
        pytest.skip("such ranks are refused")
    config = load_config(TINY, [*MODEL, *(f"parallel.{axis}={length}" for axis, length in axes.items())])
    grid = grid_of(config.parallel, 4 * axes["tensor"])
    model = build_model(config.model, 257)
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layouts = layouts_on(model, grid)
    for name, numel in shapes.items():
        owners = layouts[name].owners(grid)
        assert sum(layouts[name].part_shape(grid, rank).numel() for rank in owners) == numel, name
        parts = sum(layouts[name].part_shape(grid, rank).numel() for rank in range(grid.size))
        assert parts == layouts[name].copies(grid) * numel, name


def test_shards_and_stages_share_weights_out() -> None:
    def bytes_of(size: int, *axes: str) -> list[int]:
        config = load_config(TINY, [*MODEL, "model.tied_embeddings=false", *axes])
        grid = grid_of(config.parallel, size)
        return [states.weights for states in states_by_stage(config.model, 256, "adamw", grid)]

    (whole,) = bytes_of(1)
    (half,) = bytes_of(2, "parallel.shard=2")
    assert half == pytest.approx(whole / 2, rel=0.01), "but for what does not divide"
    assert sum(bytes_of(3, "parallel.pipeline=3")) == whole
    (copies,) = bytes_of(2)
    assert copies == whole


def test_only_what_is_not_cut_is_added_up_in_one_piece() -> None:
    config = load_config(TINY, list(MODEL))

    def flat(**axes: int) -> int:
        (states,) = states_by_stage(config.model, 256, "adamw", Grid(**axes))
        return states.flat

    (alone,) = states_by_stage(config.model, 256, "adamw", Grid())
    assert flat(size=2) == alone.weights and alone.flat == 0
    assert flat(size=2, shard=2) == 0
    assert 0 < flat(size=2, tensor=2) < alone.weights / 2, "norms and routers"
    assert flat(size=2, expert=2) < alone.weights, "not the experts, which no other rank has"


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, *ON_RANKS)


@pytest.mark.distributed
@pytest.mark.parametrize("size", ON_RANKS)
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""
