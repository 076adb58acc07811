"""Bring tokens to their experts and the experts' answers back to the tokens."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Plan:
    """Where each of the R = N*K routed rows stands once they are sorted by expert; int64 throughout."""

    order_R: Tensor
    """For each sorted row, its slot n*K + k in the routing table."""
    tokens_R: Tensor
    """For each sorted row, its token n."""
    places_NK: Tensor
    """For each slot, its place among the sorted rows: the inverse of `order_R`."""


class Dispatcher(Protocol):
    """Experts never learn whether their rows came from this device or from another."""

    def dispatch(self, x_ND: Tensor, chosen_NK: Tensor) -> tuple[Tensor, Tensor, Plan]:
        """Rows (R, D) sorted by expert, where each expert's rows end (E,) int32, and the way back."""
        ...

    def combine(self, rows_RD: Tensor, gates_NK: Tensor, plan: Plan) -> Tensor:
        """The sum of each token's rows weighted by its gates, (N, D)."""
        ...


class LocalDispatcher:
    """All experts live on this device: a stable sort, a gather, and a gather-sum back. Never waits for the device."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_ND: Tensor, chosen_NK: Tensor) -> tuple[Tensor, Tensor, Plan]:
        """See Dispatcher; an expert's rows keep the order of their tokens."""
        offsets_E, plan = sort_rows(chosen_NK, self.num_experts)
        return _Gather.apply(x_ND, plan.tokens_R, plan.places_NK), offsets_E, plan

    def combine(self, rows_RD: Tensor, gates_NK: Tensor, plan: Plan) -> Tensor:
        """See Dispatcher; summed in fp32 in the order of the gates, in the rows' dtype."""
        return _Combine.apply(rows_RD, gates_NK, plan.order_R, plan.tokens_R, plan.places_NK)


def sort_rows(chosen_NK: Tensor, num_experts: int) -> tuple[Tensor, Plan]:
    """Sort the slots of a routing table (N, K) by expert: cumulative ends (E,) int32, and the plan."""
    sorted_R, order_R = chosen_NK.reshape(-1).sort(stable=True)
    experts_E = torch.arange(num_experts, device=chosen_NK.device)
    offsets_E = torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)
    places_R = torch.empty_like(order_R)
    places_R[order_R] = torch.arange(len(order_R), device=chosen_NK.device)
    tokens_R = torch.div(order_R, chosen_NK.shape[-1], rounding_mode="floor")
    return offsets_E, Plan(order_R, tokens_R, places_R.view_as(chosen_NK))


def gather_sum(rows_RD: Tensor, places_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """out[n] = sum over k of weights[n, k] * rows[places[n, k]]: one pass, no atomics, accumulated in fp32.

    Returns (N, D) in the rows' dtype.
    """
    if rows_RD.dtype in (torch.float32, torch.float64):
        if not len(places_NK):
            return rows_RD.new_zeros(0, rows_RD.shape[1])
        weights = None if weights_NK is None else weights_NK.to(rows_RD.dtype)
        return F.embedding_bag(places_NK, rows_RD, mode="sum", per_sample_weights=weights)
    sum_ND = torch.zeros(len(places_NK), rows_RD.shape[1], dtype=torch.float32, device=rows_RD.device)
    for k in range(places_NK.shape[1]):
        row_ND = rows_RD.index_select(0, places_NK[:, k])
        # fp32 gates times low-precision rows: promoted, so nothing is rounded before the sum is complete.
        sum_ND += row_ND if weights_NK is None else row_ND * weights_NK[:, k, None]
    return sum_ND.to(rows_RD.dtype)


class _Gather(torch.autograd.Function):
    """Copy tokens to their sorted rows; backward sums a token's rows without atomics."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, tokens_R: Tensor, places_NK: Tensor) -> Tensor:
        ctx.save_for_backward(places_NK)
        return x_ND.index_select(0, tokens_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (places_NK,) = ctx.saved_tensors
        return gather_sum(grad_RD.contiguous(), places_NK), None, None


class _Combine(torch.autograd.Function):
    """Weighted gather-sum; its backward needs the rows only for the gates' gradient."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, rows_RD: Tensor, gates_NK: Tensor, order_R: Tensor, tokens_R: Tensor, places_NK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, gates_NK, order_R, tokens_R, places_NK)
        return gather_sum(rows_RD, places_NK, gates_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, gates_NK, order_R, tokens_R, places_NK = ctx.saved_tensors
        grad_RD = grad_ND.index_select(0, tokens_R)
        dtype = torch.promote_types(rows_RD.dtype, torch.float32)
        grad_gates_R = torch.linalg.vecdot(rows_RD.to(dtype), grad_RD.to(dtype))
        gates_R = gates_NK.reshape(-1).index_select(0, order_R)
        grad_gates_NK = grad_gates_R.to(gates_NK.dtype)[places_NK]
        return (grad_RD * gates_R[:, None]).to(rows_RD.dtype), grad_gates_NK, None, None, None
