"""Ranks that hold parts of a model write the files that one process writes, and each reads its parts of any.

The ranks are threads (simulated_ranks.py); parts are cut by arithmetic, so that any grid can be tried.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import checkpoint.deal
import checkpoint.sealed
import checkpoint.snapshot
import checkpoint.writing
from checkpoint.checkpoints import Checkpoints, CheckpointSettings, read_checkpoint
from checkpoint.manifest import Damaged, read_manifest
from checkpoint.sealed import read_tensors
from checkpoint.tensor_file import WrittenFile, write_tensor_file
from parallel.layout import Layout, Layouts
from parallel.mesh import Grid, Mesh
from parallel.world import World
from settings import Refusal, Section
from tests.checkpoint.simulated_ranks import simulated

EXPERTS = 4


class Config(Section):
    """A run's configuration, as far as checkpoints are concerned."""

    seed: int = 0


def grids(most: int = 8) -> list[Grid]:
    """Every grid of shard, expert, tensor and pipeline in {1, 2, 4}, and of replicas, of at most so many ranks."""
    found = []
    for shard, expert, tensor, pipeline, extra in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2), (1, 2)):
        size = max(shard, expert) * tensor * pipeline * extra
        if size <= most:
            found.append(Grid(size, shard, expert, tensor, pipeline))
    return found


def layouts_of(grid: Grid, width: int, stages: int = 2) -> Layouts:
    """A small decoder as ranks cut it: vocabulary and channels over `tensor`, all else over `shard`, unevenly."""

    def cut(layout: Layout, dim: int = 0, blocks: int = 1, tensor: bool = True, axis: str = "shard") -> Layout:
        layout = layout.cut("tensor", dim, blocks) if tensor and grid.tensor > 1 else layout
        return layout.cut(axis) if grid.length(axis) > 1 else layout  # type: ignore[arg-type]

    def lay(*shape: int, stage: int | None = None) -> Layout:
        return Layout(torch.Size(shape), stage=stage if grid.pipeline > 1 else None)

    layouts = {"embedding.weight": cut(lay(8, width, stage=0))}
    for block in range(stages):
        place, stage = f"blocks.{block}", block % grid.pipeline
        layouts[f"{place}.norm.weight"] = cut(lay(width, stage=stage), tensor=False)
        layouts[f"{place}.attention.output.weight"] = cut(lay(width, 8, stage=stage), dim=1)
        layouts[f"{place}.feed_forward.router.bias_E"] = lay(EXPERTS, stage=stage)
        layouts[f"{place}.feed_forward.router.scale"] = lay(stage=stage)
        for name, shape, dim, blocks in (("gate_up", (EXPERTS, 16, width), 1, 2), ("down", (EXPERTS, width, 8), 2, 1)):
            layout = lay(*shape, stage=stage)
            layout = layout.cut("expert") if grid.expert > 1 else layout
            layouts[f"{place}.feed_forward.experts.{name}"] = cut(layout, dim, blocks, axis="expert_shard")
    layouts["head.weight"] = cut(lay(8, width, stage=grid.pipeline - 1))
    return layouts


class Parts(nn.Module):
    """What a rank has of the whole tensors."""

    def __init__(self, wholes: dict[str, Tensor], layouts: Layouts, grid: Grid, rank: int) -> None:
        super().__init__()
        for name, whole in wholes.items():
            if layouts[name].has(grid, rank):
                part = layouts[name].take(whole, grid, rank).clone()
                if name.endswith("bias_E"):
                    self._place(name).register_buffer(name.rpartition(".")[2], part)
                else:
                    self._place(name).register_parameter(name.rpartition(".")[2], nn.Parameter(part))

    def _place(self, name: str) -> nn.Module:
        module: nn.Module = self
        for part in name.split(".")[:-1]:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module


class Rank:
    """One rank with its parts, an optimizer that has stepped on its parts of a gradient, and its checkpoints."""

    def __init__(self, folder: Path, world: World, grid: Grid, width: int, seed: int = 0, **options: Any) -> None:
        self.grid, self.rank = grid, world.rank
        self.layouts, generator = layouts_of(grid, width), torch.Generator().manual_seed(seed)
        wholes = {name: torch.randn(layout.shape, generator=generator) for name, layout in self.layouts.items()}
        gradients = {name: torch.randn(layout.shape, generator=generator) for name, layout in self.layouts.items()}
        self.model = Parts(wholes, self.layouts, grid, world.rank)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1 + seed, betas=(0.9, 0.95), foreach=False)
        for name, parameter in self.model.named_parameters():
            parameter.grad = self.layouts[name].take(gradients[name], grid, world.rank).clone()
        self.optimizer.step()
        mesh = Mesh(grid, world, {})
        settings = CheckpointSettings(**options)
        self.warnings: list[str] = []
        self.checkpoints = Checkpoints(
            folder, settings, self.model, [self.optimizer], Config(), self.warnings.append, self.layouts, mesh
        )

    def has(self, files: dict[str, dict[str, Tensor]]) -> None:
        """Assert that this rank has its parts of what files hold."""
        for name, tensor in self.model.state_dict().items():
            expected = self.layouts[name].take(files["model"][name], self.grid, self.rank)
            assert torch.equal(tensor, expected), f"{name} on rank {self.rank} of {self.grid}"
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            assert torch.equal(state["step"], files["optimizer"][f"state.{name}.step"])
            for key in ("exp_avg", "exp_avg_sq"):
                whole = files["optimizer"][f"state.{name}.{key}"]
                assert torch.equal(state[key], self.layouts[name].take(whole, self.grid, self.rank)), f"{name}.{key}"
        assert self.optimizer.param_groups[0]["lr"] == 0.1


def save(folder: Path, world: World, grid: Grid, width: int) -> None:
    rank = Rank(folder, world, grid, width)
    rank.checkpoints.save(1, {"step": 1})
    for parameter in rank.model.parameters():  # training goes on
        parameter.data.add_(1.0)
    rank.checkpoints.close()


def load(folder: Path, world: World, grid: Grid, width: int) -> Rank:
    rank = Rank(folder, world, grid, width, seed=1)
    assert rank.checkpoints.restore_latest() == {"step": 1} and not rank.warnings
    rank.checkpoints.close()
    return rank


def content(folder: Path) -> dict[str, dict[str, Tensor]]:
    step = folder / "checkpoints" / "step_00000001"
    manifest = read_manifest(step)
    return {part: read_tensors(step, f"{part}.safetensors", manifest) for part in ("model", "optimizer")}


def assert_same_content(ours: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]]) -> None:
    for part, tensors in theirs.items():
        assert ours[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert ours[part][name].dtype == tensor.dtype and torch.equal(ours[part][name], tensor), f"{part}: {name}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("alone")
    save(folder, World(), Grid(), 5)
    return folder


@pytest.mark.parametrize(
    ("grid", "file_bytes"), [*((grid, 1 << 10) for grid in grids(4)), (Grid(4, 2, 2, 2), 1 << 30)], ids=str
)
def test_any_grid_writes_what_one_process_writes_and_reads_it_back(
    grid: Grid, file_bytes: int, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.deal, "FILE_BYTES", file_bytes)
    with simulated() as on_ranks:
        on_ranks(grid.size, lambda world: save(tmp_path, world, grid, 5))
        expected, files = content(alone), content(tmp_path)
        assert_same_content(files, expected)
        assert torch.equal(read_checkpoint(tmp_path)[2]["head.weight"], expected["model"]["head.weight"])
        for rank in on_ranks(grid.size, lambda world: load(alone, world, grid, 5)):
            rank.has(expected)
        for rank in on_ranks(grid.size, lambda world: load(tmp_path, world, grid, 5)):
            rank.has(expected)
    load(tmp_path, World(), Grid(), 5).has(expected)
    names = {path.name for path in (tmp_path / "checkpoints/step_00000001").iterdir()}
    num_files = len([name for name in names if name.startswith("model")])
    assert num_files == (1 if file_bytes > 1 << 20 else min(grid.size, 4)), names
    numbers = [json.loads((f / "checkpoints/step_00000001/optimizer.json").read_text()) for f in (alone, tmp_path)]
    assert numbers[0]["numbers"] == numbers[1]["numbers"]


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(grids()), st.sampled_from(grids(4)), st.integers(1, 9), st.sampled_from([1 << 10, 1 << 30]))
def test_what_one_grid_saved_another_one_has(
    tmp_path_factory: pytest.TempPathFactory, one: Grid, other: Grid, width: int, file_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("grids")
    with pytest.MonkeyPatch.context() as patch, simulated() as on_ranks:
        patch.setattr(checkpoint.deal, "FILE_BYTES", file_bytes)
        on_ranks(one.size, lambda world: save(folder, world, one, width))
        ranks = on_ranks(other.size, lambda world: load(folder, world, other, width))
    for rank in ranks:
        rank.has(content(folder))


FOUR = Grid(4, shard=2, expert=4)


def breaking(monkeypatch: pytest.MonkeyPatch, error: Exception, when: str = "00002") -> None:
    """Let one of the files come to grief."""

    def writing(path: Path, outlines: Any, tensors: Any) -> WrittenFile:
        if when not in path.name:
            return write_tensor_file(path, outlines, tensors)
        next(tensors)
        raise error

    monkeypatch.setattr(checkpoint.snapshot, "write_tensor_file", writing)
    monkeypatch.setattr(checkpoint.deal, "FILE_BYTES", 1 << 10)


def refused(act: Any) -> str:
    try:
        act()
    except Refusal as refusal:
        return str(refusal)
    except RuntimeError as error:
        return f"fault: {error}"
    return ""


@pytest.mark.parametrize(
    "error", [OSError(28, "full"), OSError(5, "dying"), TypeError("ours")], ids=["full", "dying", "fault"]
)
def test_a_rank_that_cannot_write_is_told_on_all(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, error)

    def act(world: World) -> tuple[str, int | None]:
        rank = Rank(tmp_path, world, FOUR, 5)
        with pytest.MonkeyPatch.context() as whole:
            rank.checkpoints.peers.tell("all here")
            if world.is_main:
                whole.setattr(checkpoint.snapshot, "write_tensor_file", write_tensor_file)
            rank.checkpoints.peers.tell("mended")
            rank.checkpoints.save(1, {"step": 1})
            rank.checkpoints.wait()
        rank.checkpoints.peers.tell("broken")
        rank.checkpoints.save(2, {"step": 2})
        said = refused(rank.checkpoints.wait)
        latest = rank.checkpoints.latest_step
        with torch.no_grad():
            for parameter in rank.model.parameters():
                parameter.fill_(3.0)
        with pytest.MonkeyPatch.context() as mended:
            mended.setattr(checkpoint.snapshot, "write_tensor_file", write_tensor_file)
            rank.checkpoints.save(3, {"step": 3})
            rank.checkpoints.close()
            rank.checkpoints.peers.tell("done")
        return said, latest

    with simulated() as on_ranks:
        answers = on_ranks(4, act)
    said = {"full": "the disk is full", "dying": "dying", "ours": "fault: .*ours"}[str(error.args[-1])]
    assert len(set(answers)) == 1, "ranks differ"
    assert re.search(said, answers[0][0], re.DOTALL) and answers[0][1] == 1
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]
    weights = read_checkpoint(tmp_path)[2]
    assert all((tensor == 3).all() for name, tensor in weights.items() if "bias_E" not in name), (
        "of the one that failed"
    )


def test_too_little_room_is_told_on_all_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = checkpoint.writing.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.writing.shutil, "disk_usage", lambda _: usage)

    def act(world: World) -> tuple[str, int | None]:
        rank = Rank(tmp_path, world, FOUR, 5)
        return refused(lambda: rank.checkpoints.save(1, {"step": 1})), rank.checkpoints.latest_step

    with simulated() as on_ranks:
        answers = on_ranks(4, act)
    assert len(set(answers)) == 1 and "the disk is full" in answers[0][0] and answers[0][1] is None
    assert not list((tmp_path / "checkpoints").iterdir())


def test_damage_that_one_rank_sees_is_damage_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is verified by one rank alone."""
    monkeypatch.setattr(checkpoint.deal, "FILE_BYTES", 1 << 10)

    def saving(world: World) -> None:
        rank = Rank(tmp_path, world, FOUR, 5)
        for step in (1, 2):
            rank.checkpoints.save(step, {"step": step})
            rank.checkpoints.wait()

    def loading(world: World) -> tuple[object, list[str]]:
        rank = Rank(tmp_path, world, FOUR, 5, seed=1)
        return rank.checkpoints.restore_latest(), rank.warnings

    with simulated() as on_ranks:
        on_ranks(4, saving)
        paths = sorted((tmp_path / "checkpoints/step_00000002").glob("*.safetensors"))
        assert len(paths) > 2
        for path in paths:
            whole = path.read_bytes()
            path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
            for state, warnings in on_ranks(4, loading):
                assert state == {"step": 1} and len(warnings) == 1 and path.name in warnings[0]
            path.write_bytes(whole)
        verified, sha256 = [], checkpoint.sealed.sha256
        monkeypatch.setattr(checkpoint.sealed, "sha256", lambda path: verified.append(path) or sha256(path))
        assert all(state == {"step": 2} for state, _ in on_ranks(4, loading))
    assert len(verified) == len(set(verified)) == len(paths) + 3, "a file was verified twice, or none"


@pytest.mark.parametrize(
    ("change", "said"), [("shape", "head.weight"), ("missing", "lost.weight"), ("unknown", "head.weight")]
)
def test_a_part_that_is_not_as_its_layout_says_is_never_saved(tmp_path: Path, change: str, said: str) -> None:
    def act(world: World) -> None:
        rank = Rank(tmp_path, world, FOUR, 5)
        if change == "shape":
            rank.layouts["head.weight"] = Layout(torch.Size((9, 5)))
        elif change == "missing":
            rank.layouts["lost.weight"] = Layout(torch.Size((2,)))
        else:
            del rank.layouts["head.weight"]
        rank.checkpoints.save(1, {"step": 1})

    with simulated() as on_ranks, pytest.raises(ValueError, match=said):
        on_ranks(4, act)


def test_moments_that_only_some_ranks_have_are_never_saved(tmp_path: Path) -> None:
    def act(world: World) -> None:
        rank = Rank(tmp_path, world, Grid(2, shard=2), 4)
        if world.rank == 1:
            rank.optimizer.state.clear()
        rank.checkpoints.save(1, {"step": 1})

    with simulated() as on_ranks, pytest.raises(ValueError, match=r"exp_avg: rank 1 should have a part"):
        on_ranks(2, act)


def test_another_models_checkpoint_is_refused_on_all(tmp_path: Path) -> None:
    def act(world: World) -> str:
        rank = Rank(tmp_path, world, Grid(4, shard=2, pipeline=2), 6, seed=1)
        before = [tensor.clone() for tensor in rank.model.state_dict().values()]
        said = refused(rank.checkpoints.restore_latest)
        assert all(map(torch.equal, before, rank.model.state_dict().values()))
        return said

    save(tmp_path, World(), Grid(), 5)
    with simulated() as on_ranks:
        answers = on_ranks(4, act)
    assert len(set(answers)) == 1 and "head.weight: (8, 5) float32 in the checkpoint, (8, 6) float32 here" in answers[0]


def test_nothing_is_loaded_on_any_rank_when_one_cannot_read_its_part(tmp_path: Path) -> None:
    def act(world: World) -> None:
        rank = Rank(tmp_path, world, Grid(2, shard=2), 5, seed=1)
        before = [tensor.clone() for tensor in rank.model.state_dict().values()]
        if world.rank == 1:
            rank.checkpoints._read_parts = lambda *_: (_ for _ in ()).throw(Damaged("gone"))
        assert "gone" in refused(rank.checkpoints.restore_latest)
        assert all(map(torch.equal, before, rank.model.state_dict().values()))
        assert rank.optimizer.param_groups[0]["lr"] == 1.1

    save(tmp_path, World(), Grid(), 5)
    with simulated() as on_ranks:
        on_ranks(2, act)
