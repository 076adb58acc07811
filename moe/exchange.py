"""All-to-all between the ranks that share the experts of a layer.

A token travels once to a rank, however many of its experts live there, with the numbers of those experts and its gates;
what comes back is that rank's gate-weighted sum for it, and the sums of all ranks are added up where the token is from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from moe.experts import compute_dtype
from moe.routing import Memo, count_rows

INDEX_DTYPE = torch.int32  # of expert numbers on the wire; gloo carries nothing shorter that would do


@dataclass(frozen=True)
class Layout:
    """Which rows go to which rank and which come from where: P rows leave, M rows come, one a (token, rank) pair."""

    sent_W: list[int]
    """Rows to each rank, on the host."""
    received_W: list[int]
    """Rows from each rank, on the host."""
    tokens_P: Tensor
    """The token of each row that leaves, int64; sorted by rank, then by token."""
    places_NQ: Tensor
    """Where a token's rows stand among those that leave, by rank, Q = min(K, W) at most; P where there is none."""
    chosen_MK: Tensor
    """For each row that comes its experts among this rank's, int32; their number for slots on other ranks."""
    num_slots: int
    """How many slots of the rows that come are this rank's, on the host."""


@dataclass(frozen=True)
class Exchange:
    """Dispatcher between the ranks of a group that hold `num_experts` experts in equal parts, in order of rank.

    Sizes are exchanged once a layer and pass, and waiting for them is the only time the host waits for the device; with
    a memo they are kept, so that a recomputation has the same layout and exchanges none. A memo that keeps tokens has
    them for the recomputation too, which then sends nothing: what came home is never asked for again, as nothing behind
    it is saved for gradients. All ranks of the group have to send together, if only no tokens. Gradients take the same
    ways backwards.
    """

    group: dist.ProcessGroup
    num_experts: int

    def __post_init__(self) -> None:
        if self.num_experts % self.group.size():
            raise ValueError(f"num_experts={self.num_experts} cannot be shared equally by {self.group.size()} ranks")

    def send(self, x_ND: Tensor, chosen_NK: Tensor, gates_NK: Tensor, memo: Memo | None = None) -> "ExchangeParcel":
        """See Dispatcher; tokens travel in the dtype that the experts compute in, gates in their own."""
        layout = None if memo is None else memo.kept.get("exchange")
        if layout is None:
            layout = self._lay_out(chosen_NK)
            if memo is not None:
                memo.kept["exchange"] = layout
        there, home = Outward(layout, self.group), Homeward(layout, self.group)
        journey = Journey(there if memo is None or memo.keep is None else Once(there, memo, memo.keep), home)
        ticket: Tensor = _Begin.apply(journey, x_ND.to(compute_dtype(x_ND)), gates_NK)
        return ExchangeParcel(journey, Journey(home, there), ticket, layout, self.num_experts // self.group.size())

    @torch.no_grad()
    def _lay_out(self, chosen_NK: Tensor) -> Layout:
        num_ranks, num_tokens = self.group.size(), len(chosen_NK)
        num_local = self.num_experts // num_ranks
        owners_NK = _owners(chosen_NK, self.num_experts, num_ranks)
        goes_WN = _goes_to(owners_NK, num_ranks)
        sent = torch.stack([goes_WN.sum(dim=1), count_rows(owners_NK, num_ranks)], dim=1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        sent_W, _, received_W, slots_W = torch.cat([sent.T, received.T]).tolist()  # the wait
        num_rows = sum(sent_W)
        places_WN = (goes_WN.flatten().cumsum(0) - 1).view(goes_WN.shape).where(goes_WN, num_rows)
        tokens_WN = torch.arange(num_tokens, device=chosen_NK.device).expand_as(places_WN)
        # One spare place takes what goes nowhere, so that shapes follow from the sizes and nobody waits again.
        tokens_P = torch.empty(num_rows + 1, dtype=torch.int64, device=chosen_NK.device)
        tokens_P = tokens_P.scatter_(0, places_WN.flatten(), tokens_WN.flatten())[:num_rows]
        first_W = torch.arange(0, self.num_experts, num_local, device=chosen_NK.device)
        first_P = first_W.repeat_interleave(sent[:, 0], output_size=num_rows)
        local_PK = chosen_NK[tokens_P] - first_P[:, None]
        local_PK = local_PK.where((local_PK >= 0) & (local_PK < num_local), num_local)
        flight = _depart(local_PK.to(INDEX_DTYPE), sent_W, received_W, self.group)
        places_NQ = places_WN.T.sort(dim=1).values[:, : chosen_NK.shape[1]].contiguous()
        return Layout(sent_W, received_W, tokens_P, places_NQ, _land(flight), sum(slots_W))


@dataclass(frozen=True)
class ExchangeParcel:
    """Rows on their way; what is computed before `receive` is called overlaps it."""

    journey: "Journey"
    way_back: "Journey"
    ticket: Tensor
    layout: Layout
    num_local_experts: int

    @property
    def num_slots(self) -> int:
        """How many slots of what comes go to an expert here: all that there is to compute, of M*K at most."""
        return self.layout.num_slots

    def receive(self) -> tuple[Tensor, Tensor, Tensor]:
        """See Parcel: x (M, D), chosen (M, K) among this rank's experts, gates (M, K), 0 for slots on other ranks."""
        x_MD, gates_MK = _End.apply(self.journey, self.ticket)
        chosen_MK = self.layout.chosen_MK.to(torch.int64)
        return x_MD, chosen_MK, gates_MK.masked_fill(chosen_MK == self.num_local_experts, 0)

    def bring_back(self, out_MD: Tensor) -> Tensor:
        """See Parcel; the ranks' sums (N, D) are added in fp32 and in order of rank, whichever came first."""
        (out_ND,) = _End.apply(self.way_back, _Begin.apply(self.way_back, out_MD))
        return out_ND


@dataclass(frozen=True)
class Volume:
    """Bytes that tokens send in a forward pass; the backward pass sends the same, but no expert numbers."""

    there: int
    """To the experts: rows of tokens, expert numbers and gates."""
    back: int
    """Home: rows of sums."""
    there_by_slot: int
    """If each slot travelled alone, with its own copy of the token, its number and its gate."""
    back_by_slot: int
    """If each expert's answer travelled home alone."""


def volume(
    chosen_NK: Tensor, num_experts: int, num_ranks: int, row_bytes: int, *, gate_bytes: int = 4, rank: int | None = None
) -> Volume:
    """What an exchange of these choices sends; rows of `row_bytes` each. Waits for the device.

    rank: whose tokens they are, as what stays on a rank does not travel; left out, all of it counts.
    """
    owners_NK = _owners(chosen_NK, num_experts, num_ranks)
    counts_2W = torch.stack([_goes_to(owners_NK, num_ranks).sum(dim=1), count_rows(owners_NK, num_ranks)]).cpu()
    travels_W = torch.arange(num_ranks) != (num_ranks if rank is None else rank)
    rows, slots = counts_2W[:, travels_W].sum(dim=1).tolist()
    slot_bytes = INDEX_DTYPE.itemsize + gate_bytes
    return Volume(
        there=rows * (row_bytes + chosen_NK.shape[1] * slot_bytes),
        back=rows * row_bytes,
        there_by_slot=slots * (row_bytes + slot_bytes),
        back_by_slot=slots * row_bytes,
    )


def _owners(chosen_NK: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """The rank that holds each slot's expert, (N, K) int64; `num_ranks` for numbers past the last expert."""
    return chosen_NK.div(num_experts // num_ranks, rounding_mode="floor").clamp(max=num_ranks)


def _goes_to(owners_NK: Tensor, num_ranks: int) -> Tensor:
    """Whether a token has a slot on a rank, (W, N) bool."""
    goes_WN = torch.zeros(num_ranks + 1, len(owners_NK), dtype=torch.bool, device=owners_NK.device)
    return goes_WN.scatter_(0, owners_NK.T, True)[:num_ranks]


class Leg(Protocol):
    """One way between the ranks, begun in one place and ended in another."""

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Start to carry tensors that share their first dimension; does not wait."""
        ...

    def end(self) -> list[Tensor]:
        """Wait for them, as they arrive on this rank; keeps nothing."""
        ...


@dataclass(frozen=True)
class Journey:
    """A leg and, for gradients, the leg that is its transpose."""

    forward: Leg
    backward: Leg


@dataclass(frozen=True)
class Flight:
    """A buffer that is being filled, what fills it, and the work that does."""

    buffer: Tensor
    source: Tensor
    work: dist.Work


@dataclass
class Outward:
    """From tokens (N, ...) to a row for each rank they go to, (M, ...) on arrival."""

    layout: Layout
    group: dist.ProcessGroup
    flights: list[Flight] = field(default_factory=list)

    def begin(self, tensors: Sequence[Tensor]) -> None:
        layout = self.layout
        self.flights = [
            _depart(tensor.index_select(0, layout.tokens_P), layout.sent_W, layout.received_W, self.group)
            for tensor in tensors
        ]

    def end(self) -> list[Tensor]:
        flights, self.flights = self.flights, []
        return [_land(flight) for flight in flights]


@dataclass
class Homeward:
    """From rows (M, ...) back to their tokens (N, ...), a token's rows added up: the transpose of Outward."""

    layout: Layout
    group: dist.ProcessGroup
    flights: list[Flight] = field(default_factory=list)

    def begin(self, tensors: Sequence[Tensor]) -> None:
        layout = self.layout
        self.flights = [
            _depart(tensor.contiguous(), layout.received_W, layout.sent_W, self.group, spare=True) for tensor in tensors
        ]

    def end(self) -> list[Tensor]:
        flights, self.flights = self.flights, []
        return [_sum_places(_land(flight), self.layout.places_NQ) for flight in flights]


@dataclass
class Once:
    """A leg that the first pass alone travels: what came is kept, and given to the second."""

    leg: Leg
    memo: Memo
    keep: Callable[[Tensor], Callable[[], Tensor]]

    def begin(self, tensors: Sequence[Tensor]) -> None:
        if "arrived" not in self.memo.kept:
            self.leg.begin(tensors)

    def end(self) -> list[Tensor]:
        # Given away: torch's checkpoint holds on to the memo long after the second pass.
        arrived = self.memo.kept.pop("arrived", None)
        if arrived is not None:
            return [give() for give in arrived]
        tensors = self.leg.end()
        # Detached: an output that knows its own graph would keep it alive in a circle.
        self.memo.kept["arrived"] = [self.keep(tensor.detach()) for tensor in tensors]
        return tensors


class _Begin(torch.autograd.Function):
    """Starts a journey; its backward ends the way back. The empty ticket it returns ties it to its `_End`.

    Neither saves tensors for autograd, so a recomputation that stops at the last saved one never stops between them.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, journey: Journey, *tensors: Tensor) -> Tensor:
        ctx.journey = journey  # type: ignore[attr-defined]
        journey.forward.begin(tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, _ticket: Tensor) -> Any:
        return None, *ctx.journey.backward.end()  # type: ignore[attr-defined]


class _End(torch.autograd.Function):
    """Ends a journey; its backward starts the way back."""

    @staticmethod
    def forward(ctx: FunctionCtx, journey: Journey, ticket: Tensor) -> Any:
        ctx.journey = journey  # type: ignore[attr-defined]
        return tuple(journey.forward.end())

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Any:
        ctx.journey.backward.begin(gradients)  # type: ignore[attr-defined]
        return None, gradients[0].new_empty(0)


def _depart(
    rows: Tensor, sizes: list[int], sizes_coming: list[int], group: dist.ProcessGroup, *, spare: bool = False
) -> Flight:
    """Send rows off; with `spare`, a row of zeros stands behind those that come."""
    num_coming = sum(sizes_coming)
    buffer = rows.new_empty(num_coming + spare, *rows.shape[1:])
    if spare:
        buffer[-1] = 0
    arrivals = buffer[:-1] if spare else buffer
    work = dist.all_to_all_single(arrivals, rows, sizes_coming, sizes, group=group, async_op=True)
    assert work is not None, "this rank is not in the group"
    return Flight(buffer, rows, work)


def _land(flight: Flight) -> Tensor:
    flight.work.wait()
    return flight.buffer


def _sum_places(rows: Tensor, places_NQ: Tensor) -> Tensor:
    """Row n: the sum over q of rows[places[n, q]], accumulated in fp32 or better and in this order."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    first, *others = places_NQ.unbind(dim=1)
    total = rows.index_select(0, first).to(dtype)
    for places_N in others:
        total += rows.index_select(0, places_N)
    return total.to(rows.dtype)
