"""Gradients that lie on several ranks: added up, measured as one, and clipped."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.layout import Layout, local
from parallel.mesh import Axis, Mesh

Parameters = Mapping[str, nn.Parameter]
"""Those that this rank has a part of, by the names that layouts have."""


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, under its plain name, whether or not the model is compiled."""
    return {name.replace("_orig_mod.", ""): parameter for name, parameter in model.named_parameters()}


def sum_gradients(parameters: Parameters, layouts: Mapping[str, Layout], mesh: Mesh) -> None:
    """Add up what each layout says is left to add up, in one flat exchange for each axis and dtype.

    Gradients are summed, not averaged: each rank has divided its loss by the global count of target tokens.
    A parameter that no token of this rank touched counts as zero, so that all ranks exchange the same bytes.
    """
    if mesh.world.size == 1:
        return
    exchanges: dict[tuple[Axis, torch.dtype], list[Tensor]] = {}
    for name, p in parameters.items():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            for axis in layouts[name].sums:
                if mesh.grid.length(axis) > 1:
                    exchanges.setdefault((axis, p.dtype), []).append(local(p.grad))
    # In the order of the parameters, which is the same on all ranks of a group.
    for (axis, _), gradients in exchanges.items():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=mesh.group(axis))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def norm_over_ranks(parameters: Parameters, layouts: Mapping[str, Layout], mesh: Mesh) -> Tensor:
    """The norm of the whole model's gradient: each element counts once, however many ranks hold it. On device."""
    by_copies: dict[int, list[Tensor]] = {}
    for name, p in parameters.items():
        if p.grad is not None:
            by_copies.setdefault(layouts[name].copies(mesh.grid), []).append(local(p.grad))
    whole = by_copies.pop(mesh.grid.size, [])
    norms = [nn.utils.get_total_norm(whole)] if whole else []
    if any(layout.copies(mesh.grid) < mesh.grid.size for layout in layouts.values()):  # the same on every rank
        device = next(iter(parameters.values())).device
        squared = torch.zeros((), device=device)
        for copies, gradients in by_copies.items():
            squared = squared + nn.utils.get_total_norm(gradients).square() / copies
        norms.append(mesh.world.sum(squared).sqrt())
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, most: float) -> None:
    """Scale all gradients so that their common norm, which is `norm`, is at most `most`."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
