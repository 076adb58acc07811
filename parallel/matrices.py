"""Matrices that ranks have cut, whole for a moment: what an optimizer needs that looks at all of one."""

import torch.distributed as dist
from torch import Tensor, nn

from optim.groups import Parts
from parallel.gradients import named_parameters
from parallel.layout import Layout, Layouts, local
from parallel.mesh import Mesh


def parts_of(model: nn.Module, mesh: Mesh, layouts: Layouts) -> Parts | None:
    """How parameters are brought together and cut again; None where no rank has cut any."""
    layout_of = {parameter: layouts[name] for name, parameter in named_parameters(model).items()}
    if not any(layout.cuts for layout in layouts.values()):
        return None
    rank = mesh.world.rank
    return Parts(
        gather=lambda parameter, part: gather_parts(local(part), layout_of[parameter], mesh),
        take=lambda parameter, whole: layout_of[parameter].take(whole, mesh.grid, rank),
    )


def gather_parts(part: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    """The whole tensor on every rank, from the parts of all: one cut after another, the innermost first."""
    for number in reversed(range(len(layout.cuts))):
        outer = Layout(layout.shape, cuts=layout.cuts[:number])
        shape = outer.part_shape(mesh.grid, mesh.world.rank)
        part = _gather_one(part, Layout(shape, cuts=layout.cuts[number : number + 1]), mesh)
    return part


def _gather_one(part: Tensor, layout: Layout, mesh: Mesh) -> Tensor:
    """Of one cut: the parts of its ranks, which may be of different sizes."""
    (cut,) = layout.cuts
    ranks = mesh.grid.along(cut.axis, mesh.world.rank)
    parts = [part.new_empty(layout.part_shape(mesh.grid, rank)) for rank in ranks]
    most = max(each.numel() for each in parts)
    sent = part.new_zeros(most)
    sent[: part.numel()] = part.flatten()
    arrived = [part.new_empty(most) for _ in ranks]
    dist.all_gather(arrived, sent, group=mesh.group(cut.axis))
    whole = part.new_empty(layout.shape)
    for rank, empty, flat in zip(ranks, parts, arrived, strict=True):
        layout.put(whole, flat[: empty.numel()].view(empty.shape), mesh.grid, rank)
    return whole
