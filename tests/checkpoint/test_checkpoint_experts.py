"""Every expert has a fingerprint: one that was permuted, doubled, lost or altered on the way is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoint.checkpoints import Checkpoints, CheckpointSettings, read_checkpoint
from checkpoint.fingerprint import OtherExpert, check_experts, fingerprints
from checkpoint.manifest import digest_of
from checkpoint.sealed import sha256
from parallel.layout import Layout
from parallel.mesh import Grid, Mesh
from parallel.world import World
from settings import Refusal, Section
from tests.checkpoint.simulated_ranks import simulated

DOWN = "blocks.3.feed_forward.experts.down"


class Config(Section):
    """A run's configuration, as far as checkpoints are concerned."""

    seed: int = 0


class Layer(nn.Module):
    """Six experts, where a model has them."""

    def __init__(self, down: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"3": nn.Module()})
        self.blocks["3"].feed_forward = nn.Module()
        self.blocks["3"].feed_forward.experts = nn.Module()
        self.blocks["3"].feed_forward.experts.down = nn.Parameter(down)
        self.head = nn.Linear(2, 2)


def whole() -> Tensor:
    return torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(1))


def opened(folder: Path, down: Tensor, warnings: list[str], layout: Layout | None = None, mesh: Mesh | None = None):
    torch.manual_seed(0)
    model = Layer(down)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.blocks["3"].feed_forward.experts.down.grad = down.clone()
    optimizer.step()
    layouts = None if layout is None else {n: Layout(t.shape) for n, t in model.state_dict().items()} | {DOWN: layout}
    settings = CheckpointSettings(asynchronous=False)
    return model, Checkpoints(folder, settings, model, [optimizer], Config(), warnings.append, layouts, mesh)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return opened(tmp_path, whole(), [])[1].save(1, {"step": 1})


def tamper(folder: Path, file: str, name: str, change: Callable[[Tensor], Tensor], **prints: Any) -> None:
    """Change a tensor and everything that is said of its file, but its experts' fingerprints."""
    tensors = load_file(folder / file)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file] = {"bytes": (folder / file).stat().st_size, "sha256": sha256(folder / file)}
    manifest["tensors"][file][name]["shape"] = list(tensors[name].shape)
    manifest["digest"] = digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def swap(experts: Tensor) -> Tensor:
    return experts[[0, 5, 2, 3, 4, 1]]


def double(experts: Tensor) -> Tensor:
    return experts[[0, 1, 2, 3, 4, 2]]


def alter(experts: Tensor) -> Tensor:
    experts[4, 0, 0] += 1
    return experts


def lose(experts: Tensor) -> Tensor:
    return experts[:5]


def test_the_manifest_has_one_for_every_expert_and_every_moment(saved: Path) -> None:
    experts = json.loads((saved / "manifest.json").read_text())["experts"]
    assert set(experts) == {"model.safetensors", "optimizer.safetensors"}
    assert list(experts["model.safetensors"]) == [DOWN]
    assert list(experts["optimizer.safetensors"]) == [f"state.{DOWN}.momentum_buffer"]
    prints = experts["model.safetensors"][DOWN]
    assert len(set(prints)) == 6 and prints == fingerprints(read_checkpoint(saved)[2][DOWN])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap, f"{DOWN}: expert 1 is not what was saved (it equals expert 5)"),
        (double, f"{DOWN}: expert 5 is not what was saved (it equals expert 2)"),
        (alter, f"{DOWN}: expert 4 is not what was saved"),
        (lose, f"{DOWN}: holds 5 experts, 6 were saved"),
    ],
    ids=["swapped", "doubled", "altered", "lost"],
)
def test_an_expert_that_is_another_one_is_named(saved: Path, change: Callable, said: str, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "elsewhere" / "checkpoints" / saved.name)
    tamper(saved, "model.safetensors", DOWN, change)
    with pytest.raises(Refusal) as refused:
        read_checkpoint(saved)
    assert said in str(refused.value)
    if change is lose:  # for a model of six it is of another one
        said = f"{DOWN}: (5, 4, 8) float32 in the checkpoint, (6, 4, 8) float32 here"
    warnings: list[str] = []
    model, checkpoints = opened(tmp_path, whole() + 7, warnings)
    before = model.get_parameter(DOWN).clone()
    with pytest.raises(Refusal) as refused:
        checkpoints.restore_latest()
    assert said in str(refused.value) and torch.equal(model.get_parameter(DOWN), before)


def test_a_moment_of_another_expert_is_named(saved: Path, tmp_path: Path) -> None:
    tamper(saved, "optimizer.safetensors", f"state.{DOWN}.momentum_buffer", swap)
    _, checkpoints = opened(tmp_path, whole(), [])
    with pytest.raises(Refusal, match=r"experts\.down\.momentum_buffer: expert 1 .* \(it equals expert 5\)"):
        checkpoints.restore_latest()


@pytest.mark.parametrize("axis", ["expert", "tensor", "expert in blocks", "both"])
def test_ranks_compare_the_experts_that_they_read_a_part_of(saved: Path, tmp_path: Path, axis: str) -> None:
    """Also where each of them has only a part of every expert."""
    grid = (
        Grid(4, expert=2, tensor=2) if axis == "both" else Grid(2, expert=2) if "expert" in axis else Grid(2, tensor=2)
    )
    layout = Layout(torch.Size((6, 4, 8)))
    layout = layout.cut("expert", 0, 3 if axis == "expert in blocks" else 1) if grid.expert > 1 else layout
    layout = layout.cut("tensor", 2) if grid.tensor > 1 else layout

    def act(world: World) -> tuple[Tensor, str]:
        part = layout.take(whole(), grid, world.rank).clone()
        mesh = Mesh(grid, world, {})
        model, checkpoints = opened(tmp_path, part + 7, [], layout, mesh)
        try:
            checkpoints.restore_latest()
        except Refusal as refusal:
            return part, str(refusal)
        assert torch.equal(model.get_parameter(DOWN), layout.take(theirs, grid, world.rank))
        return part, ""

    theirs = read_checkpoint(saved)[2][DOWN]
    with simulated() as on_ranks:
        assert [said for _, said in on_ranks(grid.size, act)] == [""] * grid.size
        tamper(saved, "model.safetensors", DOWN, double)
        answers = {said for _, said in on_ranks(grid.size, act)}
    assert len(answers) == 1 and f"{DOWN}: expert 5 is not what was saved (it equals expert 2)" in answers.pop()


def test_an_older_checkpoint_has_none_and_is_read(saved: Path, tmp_path: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["experts"]
    manifest["digest"] = digest_of(manifest)
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert opened(tmp_path, whole(), [])[1].restore_latest() == {"step": 1}


def test_more_experts_than_were_saved_are_refused() -> None:
    prints = fingerprints(whole())
    check_experts("x", whole()[2:4], 2, prints)
    with pytest.raises(OtherExpert, match=r"x: expert 6 is not what was saved \(it equals expert 0\)"):
        check_experts("x", torch.cat([whole(), whole()[:1]]), 0, prints)
