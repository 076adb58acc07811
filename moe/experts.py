"""SwiGLU experts: each token through its chosen ones, on a table of ways to multiply."""

# ruff: noqa: PLR0917 (every way to multiply has the signature of ExpertMatmul)

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import grouped, kernels, megablocks
from moe.blocked import blocked
from moe.dispatch import Plan, sort_rows
from settings import Refusal

MatmulName = Literal[
    "auto", "loop", "blocked", "bmm", "grouped_mm", "fused", "triton", "megablocks_grouped", "megablocks_sparse"
]
ExpertMatmul = Callable[[Tensor, Tensor, Tensor, Tensor, Plan, bool], Tensor]
"""(x_ND, gates_NK, gate_up_EJD with J = 2F, down_EDF, plan, recompute_up) -> out_ND."""


class Experts(nn.Module):
    """E SwiGLU experts: down_e(silu(gate_e x) * up_e x), each over its own rows.

    Parameters: `gate_up` (E, 2F, D), gate first, and `down` (E, D, F).
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        expert_width: int,
        matmul: MatmulName = "auto",
        recompute: Literal["none", "up"] = "none",
    ) -> None:
        """recompute: "up" keeps no pre-activations for the backward pass, but multiplies once more there."""
        super().__init__()
        self.matmul = matmul
        self.recompute_up = recompute == "up"
        self.later: grouped.Later | None = None
        """Set from outside, where weight gradients are to be made later; ways that cannot make them at once."""
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_width, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, expert_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random weights."""
        nn.init.normal_(self.gate_up, std=0.02)
        nn.init.normal_(self.down, std=0.02)

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, gates_NK: Tensor, max_rows: int | None = None) -> Tensor:
        """The sum over k of gates[n, k] * expert chosen[n, k] of x[n]: (N, D); chosen >= E goes nowhere.

        max_rows: a bound, if one below N*K is known, on the slots that go somewhere. Under autocast tokens and weights
        are cast to its dtype first. Raises Refusal where the matmul asked for cannot.
        """
        dtype = compute_dtype(x_ND)
        gate_up, down = self.gate_up.to(dtype), self.down.to(dtype)
        matmul = choose(self.matmul, x_ND.device.type, dtype, width=down.shape[1], expert_width=down.shape[2])
        plan = sort_rows(chosen_NK, len(down), max_rows)
        # From here on dtypes are chosen on purpose: some products of low precision are computed in fp32.
        with torch.autocast(x_ND.device.type, enabled=False):
            inputs = (x_ND.to(dtype), gates_NK, gate_up, down, plan, self.recompute_up)
            if self.later is None or matmul not in grouped.CAN_WAIT or not torch.is_grad_enabled():
                return MATMULS[matmul](*inputs)
            later, leaves = self.later, (self.gate_up, self.down)
            return grouped.CAN_WAIT[matmul](*inputs, lambda stages: grouped.WaitingStages(stages, later, *leaves))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matmul of x runs in: autocast's where it is on (it does not know grouped matmuls), else x's own."""
    device = x.device.type
    is_cast = x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def loop(x_ND: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor, plan: Plan, recompute_up: bool) -> Tensor:
    """One expert after the other in plain autograd: slow, any dtype, the twin that the others are held to."""
    out_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
    ends = [0, *plan.offsets_E.tolist()]
    gates_R = gates_NK.flatten()[plan.order_R]
    # unbind once: indexing a weight by expert would write a full-size gradient for each.
    for start, stop, gate_up_JD, down_DF in zip(ends, ends[1:], gate_up.unbind(), down.unbind(), strict=False):
        tokens = plan.tokens_R[start:stop]
        gate, up = F.linear(x_ND[tokens], gate_up_JD).chunk(2, dim=-1)
        answer = F.linear(F.silu(gate) * up, down_DF)
        out_ND = out_ND.index_add(0, tokens, (answer * gates_R[start:stop, None]).to(out_ND.dtype))
    return out_ND.to(x_ND.dtype)


MATMULS: dict[str, ExpertMatmul] = {
    "loop": loop,
    "blocked": blocked,
    "bmm": grouped.bmm,
    "grouped_mm": grouped.grouped_mm,
    "fused": grouped.fused,
    "triton": grouped.triton,
    "megablocks_grouped": megablocks.grouped,
    "megablocks_sparse": megablocks.sparse,
}


def unavailable(name: str, device: str, dtype: torch.dtype, width: int, expert_width: int) -> str | None:
    """Why this matmul cannot run such experts, or None where it can."""
    sizes = {"width": width, "expert_width": expert_width}
    return next((reason for limit in LIMITS.get(name, ()) if (reason := limit(name, device, dtype, sizes))), None)


@functools.cache
def choose(name: str, device: str, dtype: torch.dtype, width: int, expert_width: int) -> str:
    """The matmul to use: `auto` is the fastest that can run here; one asked for by name is used or refused."""
    if name == "auto":
        fits = unavailable("grouped_mm", device, dtype, width, expert_width) is None
        return "grouped_mm" if device != "cpu" and fits else "blocked"
    reason = unavailable(name, device, dtype, width, expert_width)
    if reason is not None:
        raise Refusal(f'model.moe.experts="{name}": {reason}; use model.moe.experts="auto"')
    return name


Limit = Callable[[str, str, torch.dtype, dict[str, int]], str | None]
"""(matmul, device, dtype, sizes) -> why not, or None."""


def _half_or_single(name: str, device: str, dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    if dtype in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return f"takes fp32, bf16 and fp16, not {_short(dtype)}"


def _rows_of_16_bytes(name: str, device: str, dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    odd = " and ".join(f"{n}={size}" for n, size in sizes.items() if size * dtype.itemsize % 16)
    return f"needs rows of a multiple of 16 bytes, {odd} in {_short(dtype)} is not" if odd else None


def _cpu(name: str, device: str, dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    return None if device == "cpu" else f"waits for the device in every layer; it is for CPUs, this runs on {device}"


def _triton(name: str, device: str, dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    return kernels.why_not(device)


def _megablocks(name: str, device: str, dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    return megablocks.unavailable(name, device, dtype, **sizes)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LIMITS: dict[str, tuple[Limit, ...]] = {
    "bmm": (_cpu,),
    "grouped_mm": (_half_or_single, _rows_of_16_bytes),
    "fused": (_triton, _half_or_single, _rows_of_16_bytes),
    "triton": (_triton, _half_or_single),
    "megablocks_grouped": (_megablocks,),
    "megablocks_sparse": (_megablocks,),
}
