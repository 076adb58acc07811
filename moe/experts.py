"""SwiGLU experts over rows sorted by expert, on a table of ways to multiply."""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from settings import Refusal

MatmulName = Literal["auto", "loop", "blocked", "grouped_mm"]
ExpertMatmul = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(rows_RD, gate_up_EJD with J = 2F, down_EDF, offsets_E) -> rows_RD."""

BLOCK_BYTES = 2**21
"""Size of the pre-activations that `blocked` takes through all steps at once: little enough to stay in cache."""


class Experts(nn.Module):
    """E SwiGLU experts: down_e(silu(gate_e x) * up_e x), each over its own rows.

    Parameters: `gate_up` (E, 2F, D), gate first, and `down` (E, D, F).
    """

    def __init__(self, num_experts: int, width: int, expert_width: int, matmul: MatmulName = "auto") -> None:
        super().__init__()
        self.matmul = matmul
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_width, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, expert_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random weights."""
        nn.init.normal_(self.gate_up, std=0.02)
        nn.init.normal_(self.down, std=0.02)

    def forward(self, rows_RD: Tensor, offsets_E: Tensor) -> Tensor:
        """Rows (R, D) sorted by expert, expert e's ending at offsets[e] (int32, offsets[-1] == R), to rows (R, D).

        Under autocast rows and weights are cast to its dtype first. Raises Refusal where the matmul asked for cannot.
        """
        dtype = compute_dtype(rows_RD)
        gate_up, down = self.gate_up.to(dtype), self.down.to(dtype)
        rows_RD = rows_RD.to(dtype)
        matmul = choose(self.matmul, rows_RD.device.type, dtype, width=down.shape[1], expert_width=down.shape[2])
        return MATMULS[matmul](rows_RD, gate_up, down, offsets_E)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matmul of x runs in: autocast's where it is on (it does not know grouped matmuls), else x's own."""
    device = x.device.type
    is_cast = x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def unavailable(name: str, device: str, dtype: torch.dtype, width: int, expert_width: int) -> str | None:
    """Why this matmul cannot run such experts, or None where it can."""
    if name != "grouped_mm":
        return None
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes fp32, bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    odd = {n: size for n, size in (("width", width), ("expert_width", expert_width)) if size * dtype.itemsize % 16}
    if odd:
        sizes = " and ".join(f"{n}={size}" for n, size in odd.items())
        return f"needs rows of a multiple of 16 bytes, {sizes} in {str(dtype).removeprefix('torch.')} is not"
    return None


def choose(name: str, device: str, dtype: torch.dtype, width: int, expert_width: int) -> str:
    """The matmul to use: `auto` is the fastest that can run here; one asked for by name is used or refused."""
    if name == "auto":
        fits = unavailable("grouped_mm", device, dtype, width, expert_width) is None
        return "grouped_mm" if device != "cpu" and fits else "blocked"
    reason = unavailable(name, device, dtype, width, expert_width)
    if reason is not None:
        raise Refusal(f'experts="{name}": {reason}; use experts = "auto"')
    return name


def loop(rows_RD: Tensor, gate_up: Tensor, down: Tensor, offsets_E: Tensor) -> Tensor:
    """One expert after the other in plain autograd: slow, any dtype, the twin that the others are held to."""
    sizes = offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()
    answers = []
    # unbind once: indexing a weight by expert would write a full-size gradient for each.
    for rows, gate_up_JD, down_DF in zip(rows_RD.split(sizes), gate_up.unbind(), down.unbind(), strict=True):
        gate, up = F.linear(rows, gate_up_JD).chunk(2, dim=-1)
        answers.append(F.linear(F.silu(gate) * up, down_DF))
    return torch.cat(answers)


def blocked(rows_RD: Tensor, gate_up: Tensor, down: Tensor, offsets_E: Tensor) -> Tensor:
    """Blocks of one expert's rows, each taken through all steps while it is in cache: keeps little, fast on CPUs."""
    return _Blocked.apply(rows_RD, gate_up, down, offsets_E)


def grouped_mm(rows_RD: Tensor, gate_up: Tensor, down: Tensor, offsets_E: Tensor) -> Tensor:
    """All experts in one torch grouped matmul a step; on CUDA in bf16 it never waits for the device."""
    return _Grouped.apply(rows_RD, gate_up, down, offsets_E)


MATMULS: dict[str, ExpertMatmul] = {"loop": loop, "blocked": blocked, "grouped_mm": grouped_mm}


def blocks(offsets_E: Tensor, block_rows: int) -> list[tuple[int, slice]]:
    """(expert, its next rows) over all rows, at most `block_rows` at a time; experts without rows do not occur."""
    ends = offsets_E.tolist()
    spans = enumerate(itertools.pairwise([0, *ends]))
    return [
        (expert, slice(start, min(start + block_rows, stop)))
        for expert, (first, stop) in spans
        for start in range(first, stop, block_rows)
    ]


class _Blocked(torch.autograd.Function):
    """Keeps only the rows and the pre-activations; the activation is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gate_up: Tensor, down: Tensor, offsets_E: Tensor) -> Tensor:
        hidden = down.shape[2]
        block_rows = max(BLOCK_BYTES // (2 * hidden * rows_RD.itemsize), 1)
        parts = blocks(offsets_E, block_rows)
        longest = max((rows.stop - rows.start for _, rows in parts), default=0)
        z_RJ = rows_RD.new_empty(len(rows_RD), 2 * hidden)
        out_RD = torch.empty_like(rows_RD)
        h_space = rows_RD.new_empty(longest, hidden)
        for expert, rows in parts:
            z, h = z_RJ[rows], h_space[: rows.stop - rows.start]
            torch.mm(rows_RD[rows], gate_up[expert].t(), out=z)
            torch.ops.aten.silu.out(z[:, :hidden], out=h)
            torch.mm(h.mul_(z[:, hidden:]), down[expert].t(), out=out_RD[rows])
        ctx.parts, ctx.longest = parts, longest
        ctx.save_for_backward(rows_RD, z_RJ, gate_up, down)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, z_RJ, gate_up, down = ctx.saved_tensors
        grad_RD = grad_RD.contiguous()
        hidden = down.shape[2]
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        grad_rows_RD = torch.empty_like(rows_RD)
        space = rows_RD.new_empty(3, ctx.longest, hidden)
        dz_space = rows_RD.new_empty(ctx.longest, 2 * hidden)
        for expert, rows in ctx.parts:
            size = rows.stop - rows.start
            gate, up = z_RJ[rows, :hidden], z_RJ[rows, hidden:]
            silu, h, dh = space[:, :size]
            dz = dz_space[:size]
            torch.mm(grad_RD[rows], down[expert], out=dh)
            torch.ops.aten.silu.out(gate, out=silu)
            torch.mul(silu, up, out=h)
            grad_down[expert].addmm_(grad_RD[rows].t(), h)
            torch.mul(dh, silu, out=dz[:, hidden:])
            torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=dz[:, :hidden])
            grad_gate_up[expert].addmm_(dz.t(), rows_RD[rows])
            torch.mm(dz, gate_up[expert], out=grad_rows_RD[rows])
        return grad_rows_RD, grad_gate_up, grad_down, None


class _Grouped(torch.autograd.Function):
    """Keeps only the rows and the pre-activations; the activation is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gate_up: Tensor, down: Tensor, offsets_E: Tensor) -> Tensor:
        z_RJ = F.grouped_mm(rows_RD, gate_up.transpose(-2, -1), offs=offsets_E)
        gate, up = z_RJ.chunk(2, dim=-1)
        ctx.save_for_backward(rows_RD, z_RJ, gate_up, down, offsets_E)
        return F.grouped_mm(F.silu(gate).mul_(up), down.transpose(-2, -1), offs=offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, z_RJ, gate_up, down, offsets_E = ctx.saved_tensors
        grad_RD = grad_RD.contiguous()  # a gradient of stride 0, as .sum() sends it, is refused by grouped_mm
        gate, up = z_RJ.chunk(2, dim=-1)
        silu = F.silu(gate)
        dh = F.grouped_mm(grad_RD, down, offs=offsets_E)
        dz = torch.cat([torch.ops.aten.silu_backward(dh * up, gate), dh.mul_(silu)], dim=-1)
        grad_down = F.grouped_mm(grad_RD.t(), silu.mul_(up), offs=offsets_E)
        grad_gate_up = F.grouped_mm(dz.t(), rows_RD, offs=offsets_E)
        return F.grouped_mm(dz, gate_up, offs=offsets_E), grad_gate_up, grad_down, None
