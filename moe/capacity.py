"""Capacity: the most slots an expert serves in one row of training; what is beyond is dropped."""

import math
from fractions import Fraction
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from settings import Section


class CapacitySettings(Section):
    """Each expert serves at most its even share of a row times `factor` (GShard and Switch, section 2.2 of both).

    Counted row by row, so that it does not matter how a step is cut. In training only: evaluation drops nothing.
    """

    factor: float = Field(gt=0)
    """1.0 is an even share of the real experts, null ones not counted: T*K/E slots of a row of T tokens, rounded up."""
    drop: Literal["probability", "position"] = "probability"
    """Who goes first: the highest gate, whatever its place, so that a later token can displace an earlier one; or the
    earliest token, which is causal."""


def slots_per_expert(factor: float, length: int, experts_per_token: int, num_experts: int) -> int:
    """How many slots of a row of `length` tokens an expert serves: ceil(factor * T * K / E), T at most."""
    # The decimal as it was written: 1.1 of 50 is 55, but not in binary.
    return min(length, math.ceil(Fraction(str(factor)) * length * experts_per_token / num_experts))


def drop_excess(
    chosen_NK: Tensor, gates_NK: Tensor, num_rows: int, num_experts: int, settings: CapacitySettings
) -> Tensor:
    """The table with `num_experts` (nowhere) in every slot that its expert has no room for in its row.

    N tokens are `num_rows` whole rows in order. A token's slots name different experts and so never compete: there is
    no rank of first and second choices. Equal gates go by position. Slots that go nowhere already take no room.
    Gates of dropped slots are not shared out among the others. Never waits for the device.
    """
    if not chosen_NK.numel():
        return chosen_NK
    num_tokens, experts_per_token = chosen_NK.shape
    length = num_tokens // num_rows
    queues_R = _queues(chosen_NK, length, num_experts)
    order_R = ORDERS[settings.drop](gates_NK)
    sorted_R, by_queue_R = queues_R[order_R].sort(stable=True)
    order_R = order_R[by_queue_R]
    all_queues = torch.arange(num_rows * (num_experts + 1), device=chosen_NK.device)
    starts = torch.searchsorted(sorted_R, all_queues)
    places_R = torch.arange(len(order_R), device=chosen_NK.device) - starts[sorted_R]
    is_served_R = places_R < slots_per_expert(settings.factor, length, experts_per_token, num_experts)
    is_served_NK = torch.empty_like(is_served_R).scatter_(0, order_R, is_served_R).view_as(chosen_NK)
    return torch.where(is_served_NK, chosen_NK, num_experts)


def _queues(chosen_NK: Tensor, length: int, num_experts: int) -> Tensor:
    """A number for the queue that each slot stands in: that of its row and expert."""
    row_N1 = torch.arange(len(chosen_NK), device=chosen_NK.device).div(length, rounding_mode="floor").unsqueeze(-1)
    return (row_N1 * (num_experts + 1) + chosen_NK).flatten()


# The slots in the order in which they are served.
ORDERS = {
    "probability": lambda gates_NK: gates_NK.flatten().sort(descending=True, stable=True).indices,
    "position": lambda gates_NK: torch.arange(gates_NK.numel(), device=gates_NK.device),
}
