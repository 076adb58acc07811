"""Sort tokens by the experts they go to, and sum the experts' answers back; between ranks, whoever can carry them."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.routing import Memo


class Plan(NamedTuple):
    """Where each of the R routed rows stands once slots (n, k) are sorted by expert.

    Rows past `offsets_E[-1]` belong to slots that go nowhere: nothing is computed for them, they count as zero, and
    buffers may hold anything there.
    """

    offsets_E: Tensor
    """Where each expert's rows end, int32."""
    order_R: Tensor
    """For each sorted row, its slot n*K + k in the routing table, int64."""
    tokens_R: Tensor
    """For each sorted row, its token n, int64."""
    places_NK: Tensor
    """For each slot, its place among the sorted rows, int64: the inverse of `order_R`; R or above only for a slot that
    goes nowhere."""


class Parcel(Protocol):
    """Tokens on their way to the experts."""

    @property
    def num_slots(self) -> int | None:
        """How many slots of what comes go to an expert here, where the host knows it: all that there is to compute."""
        ...

    def receive(self) -> tuple[Tensor, Tensor, Tensor]:
        """x (M, D) of the tokens that came here, chosen (M, K) among this rank's experts, gates (M, K)."""
        ...

    def bring_back(self, out_MD: Tensor) -> Tensor:
        """The experts' sums (M, D) to the ranks the tokens came from, added up there: (N, D)."""
        ...


class Dispatcher(Protocol):
    """Experts never learn whether their tokens came from this device or from another."""

    def send(self, x_ND: Tensor, chosen_NK: Tensor, gates_NK: Tensor, memo: Memo | None = None) -> Parcel:
        """Start the journey of N tokens to the K experts that each of them chose; does not wait for it to end."""
        ...


@dataclass(frozen=True)
class LocalParcel:
    """Nothing has to travel."""

    x_ND: Tensor
    chosen_NK: Tensor
    gates_NK: Tensor
    num_slots = None

    def receive(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x_ND, self.chosen_NK, self.gates_NK

    def bring_back(self, out_ND: Tensor) -> Tensor:
        return out_ND


class LocalDispatcher:
    """All experts live on this device."""

    def send(self, x_ND: Tensor, chosen_NK: Tensor, gates_NK: Tensor, memo: Memo | None = None) -> LocalParcel:
        """See Dispatcher."""
        return LocalParcel(x_ND, chosen_NK, gates_NK)


def sort_rows(chosen_NK: Tensor, num_experts: int, max_rows: int | None = None) -> Plan:
    """Sort the slots of a routing table (N, K) by expert; an expert's rows keep the order of their tokens.

    Slots of `num_experts` or above go nowhere and come last. max_rows: a bound on the slots that go somewhere, where
    one is known that is below N*K; the plan then has that many rows. Never waits for the device.
    """
    sorted_R, order_R = chosen_NK.reshape(-1).sort(stable=True)
    experts_E = torch.arange(num_experts, device=chosen_NK.device)
    offsets_E = torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)
    places_R = torch.empty_like(order_R)
    places_R[order_R] = torch.arange(len(order_R), device=chosen_NK.device)
    order_R = order_R[:max_rows]
    tokens_R = torch.div(order_R, max(chosen_NK.shape[-1], 1), rounding_mode="floor")
    return Plan(offsets_E, order_R, tokens_R, places_R.view_as(chosen_NK))


def pad_rows(plan: Plan) -> Plan:
    """The same rows with every expert's filled up to as many as the busiest has; waits for the device.

    A filler row has slot N*K, which is none, and token 0: it is harmless where its gate counts as 0.
    """
    offsets_E, num_slots = plan.offsets_E.long(), plan.places_NK.numel()
    sizes_E = offsets_E.diff(prepend=offsets_E.new_zeros(1))
    num_experts, num_rows = len(sizes_E), int(offsets_E[-1])
    longest = int(sizes_E.max())
    first_E = torch.arange(num_experts, device=offsets_E.device) * longest
    # How far an expert's rows move: to its own stretch of `longest` rows.
    shift_R = (first_E - offsets_E + sizes_E).repeat_interleave(sizes_E, output_size=num_rows)
    moved_R = torch.arange(num_rows, device=offsets_E.device) + shift_R
    order_R = plan.order_R.new_full((num_experts * longest,), num_slots)
    order_R[moved_R] = plan.order_R[:num_rows]
    tokens_R = torch.zeros_like(order_R)
    tokens_R[moved_R] = plan.tokens_R[:num_rows]
    places_R = plan.places_NK.new_full((num_slots,), num_experts * longest)
    places_R[plan.order_R[:num_rows]] = moved_R
    return Plan((first_E + longest).int(), order_R, tokens_R, places_R.view_as(plan.places_NK))


def gather_sum(rows_RD: Tensor, plan: Plan, weights_NK: Tensor | None = None) -> Tensor:
    """out[n] = sum over k of weights[n, k] * rows[places[n, k]]: no atomics, accumulated in fp32 or better.

    Slots that go nowhere count as zero, whatever their weights and rows hold; where all do, row 0 is overwritten.
    Returns (N, D) in the rows' dtype; never waits for the device.
    """
    if not len(rows_RD):
        return rows_RD.new_zeros(len(plan.places_NK), rows_RD.shape[1])
    dtype = torch.promote_types(rows_RD.dtype, torch.float32)
    goes_NK = plan.places_NK < plan.offsets_E[-1]
    # A slot that goes nowhere takes row 0, times 0: that row is computed whenever any is, and else it is cleared.
    places_NK = plan.places_NK.where(goes_NK, 0)
    rows_RD[:1].masked_fill_(plan.offsets_E[-1] == 0, 0)
    weights_NK = goes_NK.to(dtype) if weights_NK is None else weights_NK.to(dtype).where(goes_NK, 0)
    # In low precision embedding_bag would round the weights to it; on a CPU a copy of the rows is the lesser evil.
    takes_bag = rows_RD.dtype == dtype or rows_RD.device.type == "cpu"
    return (_bag if takes_bag else _slot_by_slot)(rows_RD, places_NK, weights_NK).to(rows_RD.dtype)


def _bag(rows_RD: Tensor, places_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """In one pass over rows of the weights' dtype."""
    return F.embedding_bag(places_NK, rows_RD.to(weights_NK.dtype), mode="sum", per_sample_weights=weights_NK)


def _slot_by_slot(rows_RD: Tensor, places_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """In one pass for each of the K slots."""
    out_ND = weights_NK.new_zeros(len(places_NK), rows_RD.shape[1])
    for places_N, weights_N in zip(places_NK.unbind(1), weights_NK.unbind(1), strict=True):
        out_ND.addcmul_(rows_RD.index_select(0, places_N), weights_N[:, None])
    return out_ND


def gather_slots(values_R: Tensor, plan: Plan) -> Tensor:
    """One value of each sorted row, (R,), back in its slot, (N, K); 0 for slots that go nowhere."""
    if not len(values_R):
        return values_R.new_zeros(plan.places_NK.shape)
    goes_NK = plan.places_NK < plan.offsets_E[-1]
    return values_R[plan.places_NK.where(goes_NK, 0)].where(goes_NK, 0)
