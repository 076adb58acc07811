"""What routers are told of tokens, and what they decide: plain data, passed on and returned, kept in no module."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe.draws import mix


@dataclass(frozen=True)
class TokenFacts:
    """What a router may know of B rows of T tokens besides their vectors."""

    ids_BT: Tensor
    """Token ids, int64."""
    places_BT: Tensor
    """Each token's place in its row, int64; in a shard of a row, its place in the whole row."""
    row_keys_B: Tensor | None = None
    """A number for each row that no other row of the run has, int64: what draws are made from; left out, the ids."""
    is_real_BT: Tensor | None = None
    """False where padding stands: such a token meets no expert and is counted nowhere. Left out: all are real."""

    @property
    def keys_BT(self) -> Tensor:
        """An int64 number for each token, the same however the step is cut: draws are functions of it."""
        if self.row_keys_B is None:
            return mix(self.ids_BT, self.places_BT)
        return mix(self.row_keys_B[:, None], self.places_BT)


@dataclass(frozen=True)
class RoutingStats:
    """What one MoE layer decided for N tokens; returned, never kept in a module, so recompute counts nothing twice.

    E counts the null experts too, which stand behind the `num_experts` real ones.
    """

    logits_NE: Tensor
    """Raw router outputs, fp32, with gradient."""
    probabilities_NE: Tensor
    """Scores scaled to sum to 1 over all experts, fp32, with gradient: what the balance loss uses."""
    selected_NK: Tensor
    """What the router wanted, int64, best first: before capacity dropped anything. E where it wanted nothing."""
    chosen_NK: Tensor
    """Where rows go, int64: an expert, or `num_experts` for a slot that goes nowhere (dropped, null, padding)."""
    gates_NK: Tensor
    """How much each chosen expert counts, fp32, with gradient; 0 for a slot that goes nowhere."""
    num_experts: int
    """Real experts: those that compute."""
    is_real_N: Tensor | None = None
    """False for padding; None: every token is real."""
    copy_N: Tensor | None = None
    """How much of the token itself joins the output, fp32: the gates of null experts that copy."""

    @property
    def counts_E(self) -> Tensor:
        """Rows that each real expert computes, (num_experts,) int64."""
        return count_rows(self.chosen_NK, self.num_experts)

    @property
    def selected_E(self) -> Tensor:
        """How often each expert, null ones included, was wanted, (E,) int64: the load of balance losses and biases."""
        return count_rows(self.selected_NK, self.logits_NE.shape[1])

    @property
    def num_real(self) -> Tensor | int:
        """Tokens that are no padding."""
        return len(self.logits_NE) if self.is_real_N is None else self.is_real_N.sum()


@dataclass
class Memo:
    """A layer's first decisions, kept for its recomputation: made once, used again, so they can never differ.

    Holds what the first forward pass wrote under a name; a later pass with the same memo reads it instead.
    """

    kept: dict[str, Any] = field(default_factory=dict)
    keep: Callable[[Tensor], Callable[[], Tensor]] | None = None
    """Puts tokens that came from other ranks where they are kept, so that they are not sent twice, and returns what
    gives them back; None: they are sent again."""


def count_rows(chosen: Tensor, num_experts: int) -> Tensor:
    """How many slots name each expert, (E,) int64; larger numbers count nowhere. Without waiting for the device."""
    chosen_R = chosen.reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add_(0, chosen_R.clamp(max=num_experts), torch.ones_like(chosen_R))[:num_experts]
