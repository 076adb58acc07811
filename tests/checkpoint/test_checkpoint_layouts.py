"""However ranks share a model: what one layout saved, any other one goes on from, weights, moments, losses and batches.

Cases run on 2 and on 4 gloo ranks (tests/ranks.py), the main one of which also is the one process that they are
compared with. Files are the same whatever layout writes them, so that each layout is held to that: what one process
wrote comes back from it bit for bit, and what it has trained and written comes back from the next layout, from one
process and from itself.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import checkpoint.deal
import train
from checkpoint.checkpoints import Checkpoints, CheckpointSettings
from checkpoint.manifest import read_manifest
from checkpoint.sealed import read_tensors
from parallel.layout import Layout, local
from parallel.mesh import Grid, Mesh
from parallel.world import World
from settings import Section
from tests.parallel.setting import Setting, this_world

BEFORE, AFTER = 2, 5
"""Steps of one process until its checkpoint, and those that are compared after it."""
SMALL = (
    "tokens_per_microbatch=128",
    "model.num_layers=4",  # as many as the most ranks of a pipeline
    "model.attention.num_heads=4",
    "model.attention.num_kv_heads=4",
    "model.moe.num_shared_experts=1",
    # AdamW's first steps divide by the gradient's own size: of elements that have none, only rounding would be left.
    "optimizer.epsilon=1e-5",
)
RATE = 2e-3  # another one than the configuration's: it has to come from the checkpoint
PAIRS = (("shard", "tensor"), ("expert", "tensor"), ("shard", "context"), ("shard", "pipeline"), ("tensor", "pipeline"))
Content = dict[str, dict[str, Tensor]]


class Config(Section):
    """A run's configuration, as far as checkpoints are concerned."""

    seed: int = 0


def layouts() -> Iterator[tuple[str, ...]]:
    """Each axis as long as there are ranks for, pairs of axes that are not, and replicas."""
    size = dist.get_world_size()
    yield from ((f"parallel.{axis}={size}",) for axis in ("shard", "expert", "context", "tensor", "pipeline"))
    if size == 4:
        yield from ((f"parallel.{one}=2", f"parallel.{other}=2") for one, other in PAIRS)
        yield "parallel.shard=2", "parallel.expert=4"
        yield ("parallel.shard=2",)
    else:
        yield ()


class Saver(Setting):
    """A setting that saves and loads; folder: its own checkpoints."""

    def __init__(self, world: World, folder: str, *overrides: str, seed: int = 1) -> None:
        super().__init__(world, *SMALL, *overrides, seed=seed)
        folder += f" of {dist.get_rank()}" if world.rank != dist.get_rank() else ""  # it has no other rank to think of
        optimizers, mesh, layouts = self.optimizer.optimizers, self.run.mesh, self.run.layouts
        settings = CheckpointSettings(keep=9)
        self.checkpoints = Checkpoints(
            Path(folder), settings, self.model, optimizers, self.config, print, layouts, mesh
        )

    def save(self, step: int, meanwhile: Callable[[], Any] = lambda: None) -> Any:
        self.checkpoints.save(step, {"step": step})
        result = meanwhile()
        self.checkpoints.wait()
        return result

    def load(self, folder: str, step: int) -> None:
        assert self.checkpoints.restore(place_of(folder, step)) == {"step": step}

    def losses(self, steps: range) -> list[float]:
        return [float(self.step(number).loss) for number in steps]


def place_of(folder: str, step: int) -> Path:
    return Path(folder) / f"checkpoints/step_{step:08d}"


def content(folder: str, step: int) -> Content:
    """All that is in a checkpoint, numbers included."""
    place = place_of(folder, step)
    manifest = read_manifest(place)
    files = {part: read_tensors(place, f"{part}.safetensors", manifest) for part in ("model", "optimizer")}
    numbers = json.dumps(json.loads((place / "optimizer.json").read_text())["numbers"], sort_keys=True)
    return {**files, "numbers": {"all": torch.tensor(list(numbers.encode()))}}


def assert_same(ours: str, theirs: str, step: int, their_step: int | None = None) -> None:
    """Bit for bit, on the main rank; the others wait."""
    if dist.get_rank() == 0:
        one, other = content(ours, step), content(theirs, step if their_step is None else their_step)
        for part, tensors in other.items():
            assert one[part].keys() == tensors.keys(), f"{ours}: other names in {part}"
            for name, tensor in tensors.items():
                assert torch.equal(one[part][name], tensor), f"{ours}: {part} {name} is not that of {theirs}"
    dist.barrier()


def rows(setting: Setting, number: int) -> list[str]:
    """What each row of a step is, on all ranks together: its number and a digest of its tokens and labels."""
    found = set()
    for batch in train.take_step(setting.batches, setting.plan(number), setting.run):
        for place, row in enumerate(batch.rows_B.tolist()):
            text = f"{batch.tokens_BT[place].tolist()} {batch.labels_BT[place].tolist()}"
            found.add(f"{row} {hashlib.sha256(text.encode()).hexdigest()}")
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, sorted(found))
    return sorted({row for each in everybody for row in each})


def one_process(folder: str, *overrides: str) -> list[float]:
    """Trains and saves as if there were no other rank, on the main one; the losses that follow, on all."""
    setting, told = Saver(World(), folder, *overrides, seed=0), [[0.0]]
    if dist.get_rank() == 0:
        setting.losses(range(BEFORE))
        setting.optimizer.set_learning_rate(RATE)
        setting.save(BEFORE)
        told = [setting.losses(range(BEFORE, BEFORE + AFTER))]
    dist.broadcast_object_list(told)
    return told[0]


def assert_has(setting: Setting, files: Content) -> None:
    """What torch itself makes whole of a sharded parameter, and a moment of it, is what was saved."""
    named = setting.model.state_dict(keep_vars=True)
    moments = {parameter: state for each in setting.optimizer.optimizers for parameter, state in each.state.items()}
    for name, tensor in named.items():
        if isinstance(tensor, DTensor) and setting.run.mesh.grid.tensor * setting.run.mesh.grid.expert == 1:
            for key, value in (("", tensor), *(moments[tensor].items() if tensor in moments else ())):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                expected = files["optimizer"][f"state.{name}.{key}"] if key else files["model"][name]
                assert torch.equal(whole, expected), f"{name} {key}"


def case_any_layout_goes_on_from_what_one_process_saved_and_the_next_from_what_it_saved() -> None:
    checkpoint.deal.FILE_BYTES = 1 << 14  # so that every rank writes
    expected, before = one_process("one"), None
    alone = Saver(World(), "alone")
    expected_rows = [rows(alone, number) for number in range(BEFORE, BEFORE + AFTER)]
    for layout in layouts():
        name, step = "+".join(layout) or "replicate", BEFORE + (AFTER if len(layout) == 1 else 2)
        ours = Saver(this_world(), name, *layout)
        ours.load("one", BEFORE)
        assert_has(ours, content("one", BEFORE))
        ours.save(BEFORE)
        assert_same(name, "one", BEFORE)
        assert [rows(ours, number) for number in range(BEFORE, BEFORE + AFTER)] == expected_rows
        assert ours.losses(range(BEFORE, step)) == pytest.approx(expected[: step - BEFORE], rel=1e-5), name
        following = ours.save(step, meanwhile=lambda: ours.losses(range(step, step + 1)))  # noqa: B023
        ours.load(name, step)
        assert ours.losses(range(step, step + 1)) == following, f"{name}: not bit for bit"
        if dist.get_rank() == 0:
            alone.load(name, step)
            assert alone.losses(range(step, step + 1)) == pytest.approx(following, rel=1e-5), name
        if before is not None:
            ours.load(*before)
            ours.save(step + 1)
            assert_same(name, before[0], step + 1, before[1])
        before = name, step


def case_muon_and_its_momentum() -> None:
    muon, size = "optimizer.kind=muon", dist.get_world_size()
    expected = one_process("muon", muon)
    for layout in (f"parallel.shard={size}", "parallel.tensor=2", f"parallel.pipeline={size}"):
        ours = Saver(this_world(), f"muon {layout}", muon, layout)
        ours.load("muon", BEFORE)
        ours.save(BEFORE)
        assert_same(f"muon {layout}", "muon", BEFORE)
        assert ours.losses(range(BEFORE, BEFORE + 2)) == pytest.approx(expected[:2], rel=1e-5), layout


def case_shards_that_are_uneven_and_empty() -> None:
    """Three rows, and one, over the ranks: the last of them have none."""
    world, size = this_world(), dist.get_world_size()
    grid = Grid(size, shard=size)
    mesh = dist.init_device_mesh("cpu", (size,))
    alone = uneven(0)
    if world.is_main:
        checkpoints = checkpoints_at("uneven alone", *alone)
        checkpoints.save(1, {"step": 1})
        checkpoints.close()
    dist.barrier()
    for seed in (0, 1):
        model, optimizer = uneven(seed, mesh)
        layouts = {name: Layout(tensor.shape).cut("shard") for name, tensor in model.state_dict().items()}
        parts = [local(parameter).numel() for parameter in model.parameters()]
        assert world.rank < size - 1 or 0 in parts, "no part is empty"
        folder = f"uneven {seed}"
        if seed == 1:
            checkpoints = checkpoints_at("uneven alone", model, optimizer, layouts, Mesh(grid, world, {}))
            assert checkpoints.restore_latest() == {"step": 1}
        checkpoints = checkpoints_at(folder, model, optimizer, layouts, Mesh(grid, world, {}))
        checkpoints.save(1, {"step": 1})
        checkpoints.close()
        assert_same(folder, "uneven alone", 1)
    if world.is_main:
        model, optimizer = uneven(2)
        assert checkpoints_at("uneven 1", model, optimizer).restore_latest() == {"step": 1}
        for ours, theirs in zip(model.parameters(), alone[0].parameters(), strict=True):
            assert torch.equal(ours, theirs)
            for key, value in alone[1].state[theirs].items():
                assert torch.equal(optimizer.state[ours][key], value)


def uneven(seed: int, mesh: Any = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with a step behind it, sharded over a mesh if one is given."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    values = {name: (tensor.clone(), torch.randn_like(tensor)) for name, tensor in model.named_parameters()}
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for name, parameter in model.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        rank, size = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
        chunk = Layout(parameter.shape).cut("shard").take(values[name][1], Grid(size, shard=size), rank)
        local(parameter.grad).copy_(chunk)
    optimizer.step()
    return model, optimizer


def checkpoints_at(folder: str, model: nn.Module, optimizer: Any, *lying: Any) -> Checkpoints:

    lying = lying or (None, Mesh(Grid(), World(), {}))
    return Checkpoints(Path(folder), CheckpointSettings(), model, [optimizer], Config(), print, *lying)


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "size"), itertools.product(CASES, (2, 4)))
def test_on_ranks(outcomes: dict[int, dict[str, str]], case: str, size: int) -> None:
    assert outcomes[size].get(case, "never came to it") == ""
