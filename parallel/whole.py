"""A whole model on every rank, for a while: evaluation asks rank by rank, and none waits for another's rows."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.transformer import Transformer, build_model
from parallel.layout import Layouts, local
from parallel.mesh import Mesh


def is_in_parts(mesh: Mesh) -> bool:
    """Whether ranks hold parts of a layer or some layers; experts alone do not count, tokens travel to them."""
    grid = mesh.grid
    return grid.shard > 1 or grid.tensor > 1 or grid.pipeline > 1


@contextmanager
def whole_model(model: Transformer, mesh: Mesh, layouts: Layouts) -> Iterator[Transformer]:
    """The model itself where every rank can ask it alone, else a copy with all values, which inside is this rank's own.

    All ranks have to enter. The copy needs its memory on each rank; it is given up at the end.
    """
    if not is_in_parts(mesh):
        yield model
        return
    device = next(model.parameters()).device
    copy = build_model(model.settings, model.vocab_size).to_empty(device=device)
    copy.rotary = model.rotary
    gather(dict(model.state_dict()), copy.state_dict(), mesh, layouts)
    copy.train(model.training)
    yield copy


@torch.no_grad()
def gather(parts: Mapping[str, Tensor], wholes: Mapping[str, Tensor], mesh: Mesh, layouts: Layouts) -> None:
    """Fill whole tensors, on every rank, with what the ranks have: each part is sent once by one that has it."""
    grid, me = mesh.grid, mesh.world.rank
    plain = {name.replace("_orig_mod.", ""): local(part) for name, part in parts.items()}
    for name, whole in wholes.items():
        layout = layouts[name]
        for rank in layout.owners(grid):
            shape = layout.part_shape(grid, rank)
            part = plain[name].contiguous() if rank == me else whole.new_empty(shape)
            dist.broadcast(part, src=rank)
            layout.put(whole, part, grid, rank)


@torch.no_grad()
def fill(
    model: nn.Module,
    device: torch.device,
    mesh: Mesh,
    layouts: Layouts,
    value_of: Callable[[str, torch.Size], Tensor],
) -> None:
    """Move a model from the meta device and give every parameter and buffer of this rank its part of a whole value.

    value_of: the whole value of a name and its shape, one at a time: no rank ever needs the memory of all of them.
    """
    model.to_empty(device=device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        layout = layouts[name.replace("_orig_mod.", "")]
        local(tensor).copy_(layout.take(value_of(name, layout.shape), mesh.grid, mesh.world.rank))
