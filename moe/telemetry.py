"""What a run tells of its routing: a fixed number of series, however many experts and layers there are."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe.balance import as_is, only_real
from moe.routing import RoutingStats


class HasBias(Protocol):
    """The part of a Router that is told of."""

    @property
    def bias_E(self) -> Tensor | None: ...


class RoutingMeter:
    """Adds up a step's routing over its micro-batches on the device; `report` is the only wait.

    On several ranks `tensors` are summed between the last `add` and `report`. The maximum over ranks comes out of the
    same sum, as each rank of `num_ranks` writes into a place of its own.
    """

    def __init__(self, routers: Sequence[HasBias] = (), rank: int = 0, num_ranks: int = 1) -> None:
        """routers: whose selection biases are told, as they are when the report is made."""
        self.routers, self.rank, self.num_ranks = routers, rank, num_ranks
        self.num_experts = 0
        """Real experts; null ones stand behind them."""
        self.counts_LE: Tensor | None = None
        """How often each expert, null ones included, was wanted in each layer, int64."""
        self.sums_LE: Tensor | None = None
        """Sums over real tokens of the probabilities, fp32."""
        self.sums_L4: Tensor | None = None
        """Sums over real tokens of the squared logsumexp, of the entropy and of 1, and the rows computed, fp64."""
        self.largest_W: Tensor | None = None
        """The largest absolute logit of each rank."""
        self.computed_rows: float | None = None
        """Rows that real experts computed in all layers together, once a report was made; None: no such layers."""
        self._first_choices: list[Tensor] | None = None
        self._route_again: Callable[[], Sequence[RoutingStats]] | None = None
        self._sum_over_shards: Callable[[Tensor], Tensor] = as_is

    def expect(self, num_layers: int, num_experts: int, num_null: int, device: torch.device) -> None:
        """Make room for all layers of a model of which only some are here: see `add`."""
        num_slots, self.num_experts = num_experts + num_null, num_experts
        self.counts_LE = torch.zeros(num_layers, num_slots, dtype=torch.int64, device=device)
        self.sums_LE = torch.zeros(num_layers, num_slots, device=device)
        self.sums_L4 = torch.zeros(num_layers, 4, dtype=torch.float64, device=device)
        self.largest_W = torch.zeros(self.num_ranks, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, all_stats: Sequence[RoutingStats], layers: slice = slice(None)) -> None:
        """Count one micro-batch's first forward pass; never a recomputed one. layers: which of all MoE layers it is."""
        if not all_stats:
            return
        self.num_experts = all_stats[0].num_experts
        counts_LE = torch.stack([stats.selected_E for stats in all_stats])
        sums_LE = torch.stack([only_real(stats, stats.probabilities_NE).sum(dim=0) for stats in all_stats])
        sums_L4 = torch.stack([_sums_4(stats) for stats in all_stats])
        largest_W = counts_LE.new_zeros(self.num_ranks, dtype=torch.float64)
        largest_W[self.rank] = torch.stack([_largest_logit(stats) for stats in all_stats]).max()
        if self.counts_LE is None or self.sums_LE is None or self.sums_L4 is None or self.largest_W is None:
            self.counts_LE, self.sums_LE, self.sums_L4, self.largest_W = counts_LE, sums_LE, sums_L4, largest_W
            return
        self.counts_LE[layers] += counts_LE
        self.sums_LE[layers] += sums_LE
        self.sums_L4[layers] += sums_L4
        self.largest_W = torch.maximum(self.largest_W, largest_W)

    def watch(
        self,
        all_stats: Sequence[RoutingStats],
        num_tokens: int,
        route_again: Callable[[], Sequence[RoutingStats]],
        sum_over_shards: Callable[[Tensor], Tensor] = as_is,
    ) -> None:
        """Let `report` tell how many choices of the first `num_tokens` tokens `route_again` then leaves as they were.

        `route_again` gives the stats of exactly these tokens, with the weights that the model has by then. Where ranks
        hold parts of the same rows, `sum_over_shards` adds up over them, and all of them have to ask for the report; it
        takes and gives (L, 2), where a rank may be given more layers than it has.
        """
        self._first_choices = [stats.selected_NK[:num_tokens].clone() for stats in all_stats]
        self._route_again, self._sum_over_shards = route_again, sum_over_shards

    def tensors(self) -> list[Tensor]:
        """What a run on several ranks adds up in place (all-reduce) before it reads or updates anything."""
        return [t for t in (self.counts_LE, self.sums_LE, self.sums_L4, self.largest_W) if t is not None]

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """The step's numbers as plain floats; empty when nothing was added. Waits for the device once.

        balance_loss (of scope "batch"), router_z_loss and router_entropy (1.0: even) are means over layers.
        max_violation is the busiest expert's load over the mean load, minus 1, in the worst layer; mean_violation the
        same as a mean over layers; load_variation the load's standard deviation over its mean, a mean over layers.
        dead_experts counts real experts that nobody wanted, over all layers. dropped_share: of the rows wanted from
        real experts, those that were not computed. null_share: of all that was wanted, what null experts got.
        choice_overlap: see `watch`; of this rank's rows.
        """
        if self.counts_LE is None or self.sums_LE is None or self.sums_L4 is None or self.largest_W is None:
            return {}
        z_L, entropy_L, tokens_L, computed_L = self.sums_L4.unbind(dim=1)
        tokens_L = tokens_L.clamp(min=1)
        share_LE = self.counts_LE / self.counts_LE.sum(dim=1, keepdim=True).clamp(min=1)
        wanted_LE = self.counts_LE[:, : self.num_experts].double()
        mean_L = wanted_LE.mean(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        violation_L = torch.where(wanted_LE.any(dim=1), wanted_LE.amax(dim=1) / mean_L - 1, 0.0)
        numbers = {
            "balance_loss": (share_LE.shape[1] * (share_LE * self.sums_LE).sum(dim=1) / tokens_L).mean(),
            "router_z_loss": (z_L / tokens_L).mean(),
            "max_violation": violation_L.max(),
            "mean_violation": violation_L.mean(),
            "load_variation": (wanted_LE.std(dim=1, correction=0) / mean_L).mean(),
            "dead_experts": (wanted_LE == 0).sum(),
            "router_entropy": (entropy_L / tokens_L).mean(),
            "router_logit_max": self.largest_W.max(),
            "dropped_share": _share(wanted_LE.sum() - computed_L.sum(), wanted_LE.sum()),
        }
        if self.num_experts < self.counts_LE.shape[1]:
            numbers["null_share"] = _share(self.counts_LE.sum() - wanted_LE.sum(), self.counts_LE.sum())
        biases_LE = [router.bias_E for router in self.routers if router.bias_E is not None]
        if biases_LE:
            numbers["bias_min"], numbers["bias_max"] = torch.stack(biases_LE).aminmax()
        if self._route_again is not None and self._first_choices is not None:
            numbers["choice_overlap"] = self._overlap(self._route_again())
        computed, *told = torch.stack([n.double() for n in (computed_L.sum(), *numbers.values())]).tolist()
        self.computed_rows = computed
        return dict(zip(numbers, told, strict=True))

    def _overlap(self, all_stats: Sequence[RoutingStats]) -> Tensor:
        """The mean over layers of the choices that stayed."""
        assert self._first_choices is not None and self.sums_L4 is not None
        sums_L2 = self.sums_L4.new_zeros(len(all_stats), 2)
        for sums, old, new in zip(sums_L2, self._first_choices, all_stats, strict=True):
            sums += overlap_sums(old, new.selected_NK, new.logits_NE.shape[1])
        share_L, chose_L = self._sum_over_shards(sums_L2).unbind(dim=1)
        return (share_L / chose_L.clamp(min=1)).mean()


def choice_overlap(selected_a_NK: Tensor, selected_b_NK: Tensor, num_experts: int | None = None) -> Tensor:
    """The mean share of a token's experts that are the same in two routings of the same N tokens: a scalar, 0 to 1.

    The two may have different K; the share is then of the longer list. num_experts: numbers from there on are empty
    slots, and tokens that chose nothing either time are left out; without it every number is an expert.
    """
    share, chose = overlap_sums(selected_a_NK, selected_b_NK, num_experts)
    return share / chose.clamp(min=1)


def overlap_sums(selected_a_NK: Tensor, selected_b_NK: Tensor, num_experts: int | None = None) -> Tensor:
    """(shares added up, tokens that chose something): `choice_overlap` is one over the other."""
    limit = torch.iinfo(torch.int64).max if num_experts is None else num_experts
    is_same_NKK = (selected_a_NK[:, :, None] == selected_b_NK[:, None, :]) & (selected_a_NK < limit)[:, :, None]
    most_N = torch.maximum((selected_a_NK < limit).sum(dim=1), (selected_b_NK < limit).sum(dim=1))
    share_N = is_same_NKK.flatten(1).sum(dim=1) / most_N.clamp(min=1)
    return torch.stack([share_N.sum(), (most_N > 0).sum().to(share_N.dtype)])


def _sums_4(stats: RoutingStats) -> Tensor:
    num_experts = stats.logits_NE.shape[1]
    entropy = torch.special.entr(only_real(stats, stats.probabilities_NE)).sum() / math.log(max(num_experts, 2))
    z = only_real(stats, stats.logits_NE.logsumexp(dim=-1).square()).sum()
    sums = [z, entropy, _on(z.device, stats.num_real), stats.counts_E.sum()]
    return torch.stack([value.double() for value in sums])


def _on(device: torch.device, count: Tensor | int) -> Tensor:
    """A number of the host is written there, not copied: a copy would wait for all that the device has still to do."""
    return count if isinstance(count, Tensor) else torch.full((), count, device=device)


def _largest_logit(stats: RoutingStats) -> Tensor:
    logits_NE = only_real(stats, stats.logits_NE).abs()
    return logits_NE.amax().double() if logits_NE.numel() else logits_NE.new_zeros((), dtype=torch.float64)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp(min=1)
