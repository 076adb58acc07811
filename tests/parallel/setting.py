"""One run's step on this rank of a world, or as if there were no other: what equality over ranks is tested with."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import train
from context.step_plan import StepPlan
from data.batches import Batch, Batches, DataSettings
from model.initialize import first_values
from model.transformer import build_model
from optim.groups import Optimizer, build_optimizer
from parallel.apply import parallelize
from parallel.gradients import named_parameters
from parallel.layout import local
from parallel.matrices import parts_of
from parallel.mesh import Mesh, build_mesh
from parallel.sequence import RowGroup, build_row_groups, split_attention
from parallel.whole import fill, gather
from parallel.world import World
from run.config import RunConfig, load_config
from run.pipeline_step import pipeline_step
from run.record import StepReport
from run.start import Run

TINY = Path(__file__).parents[1] / "tiny.toml"
CPU = torch.device("cpu")


def this_world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), dist.get_rank())


def assert_close(name: str, ours: Tensor | float, theirs: Tensor | float, tolerance: float = 1e-6) -> None:
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, f"{name}: {ours.shape}, not {theirs.shape}"
    error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-30)
    assert error <= tolerance, f"{name}: off by {error:.2e}, relative"


def text() -> str:
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(97, 103, (24_000,), generator=generator)
    letters[torch.rand(len(letters), generator=generator) < 0.2] = ord(" ")
    return bytes(letters.tolist()).decode()


_BATCHES: dict[str, Batches] = {}


def batches_of(data: DataSettings, world: World) -> Batches:
    """Of each once, as documents are read and counted."""
    key = f"{data!r} {world.rank} {world.size}"
    if key not in _BATCHES:
        _BATCHES[key] = Batches(data, seed=0, rank=world.rank, world_size=world.size)
    return _BATCHES[key]


_MESHES: dict[str, tuple[Mesh, dict[int, RowGroup]]] = {}


def mesh_of(config: RunConfig, world: World) -> tuple[Mesh, dict[int, RowGroup]]:
    """Each once, as making groups takes long; all ranks ask for the same ones in the same order."""
    parallel, sizes = config.parallel, config.all_row_ranks
    key = f"{parallel!r} {sizes} {world}"
    if key not in _MESHES:
        mesh = build_mesh(parallel, sizes, world, CPU)
        _MESHES[key] = mesh, build_row_groups(parallel.sequence, sizes, mesh)
    return _MESHES[key]


class Setting:
    """All that one optimizer step needs. Routers start far from an even load."""

    def __init__(self, world: World, *overrides: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        if this_world().is_main and not Path("words.txt").exists():
            Path("words.txt").write_text(text())
        dist.barrier()
        self.config: RunConfig = load_config(TINY, list(overrides))
        config = self.config
        mesh, groups = mesh_of(config, world)
        group = groups[config.row_ranks(config.stages[0])]
        self.run = Run(config, Path("runs/none"), CPU, dtype, world, group, groups, mesh)
        self.batches = batches_of(config.data, self.run.groups)
        self.model = build_model(config.model, self.batches.tokenizer.vocab_size)
        self.run.layouts = parallelize(self.model, mesh, config, CPU, dtype)
        fill(self.model, CPU, mesh, self.run.layouts, lambda name, shape: self.first_value(name, shape, seed))
        split_attention(self.model, group)
        self.model.use_rotary(self.plan(0).stage.rotary)
        self.optimizer: Optimizer = build_optimizer(
            self.model, config.optimizer, parts_of(self.model, mesh, self.run.layouts)
        )

    def first_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        value = first_values(name, shape, self.config.model, seed)
        if name == "embedding.weight":
            value[:, 0] += 0.1
        if name.endswith("router.weight"):
            value[:, 0] += torch.linspace(-0.05, 0.05, len(value))
        return value

    def plan(self, number: int) -> StepPlan:
        return self.config.stages[0].step(number)

    def microbatches(self, number: int) -> list[Batch]:
        return train.split(train.take_step(self.batches, self.plan(number), self.run), self.plan(number), self.run)

    def step(self, number: int) -> StepReport:
        step = pipeline_step if self.run.mesh.grid.pipeline > 1 else train.train_step
        return step(self.model, self.optimizer, self.microbatches(number), self.plan(number), self.run)

    def parts(self) -> dict[str, Tensor]:
        """This rank's part of every parameter and buffer."""
        return {name: local(tensor).detach() for name, tensor in self.model.state_dict().items()}

    def gradients(self) -> dict[str, Tensor]:
        """This rank's part of the gradient of every parameter."""
        return {name: local(p.grad) for name, p in named_parameters(self.model).items() if p.grad is not None}

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same of the whole model, on every rank."""
        layouts = {name: self.run.layouts[name] for name in self.run.layouts if self._has(name, parts)}
        wholes = {name: torch.full(layout.shape, torch.nan, dtype=layout.dtype) for name, layout in layouts.items()}
        gather(parts, wholes, self.run.mesh, self.run.layouts)
        return wholes

    def _has(self, name: str, parts: Mapping[str, Tensor]) -> bool:
        """Whether some rank has a part: parameters have gradients everywhere, buffers nowhere."""
        return name in parts or self.run.layouts[name].stage is not None
