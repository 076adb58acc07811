"""Keeping the experts evenly loaded: losses, the bias rule, and what to log. Pure functions of RoutingStats."""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from moe.router import Router, RoutingStats
from settings import Section


class LossBalanceSettings(Section):
    """A loss that is least when every expert gets its share (Switch Transformer, section 2.2)."""

    kind: Literal["loss"] = "loss"
    coefficient: float = Field(default=0.01, ge=0)


class BiasBalanceSettings(Section):
    """A selection bias moved against the load after each step, without a gradient (Wang et al. 2024, algorithm 1)."""

    kind: Literal["bias"] = "bias"
    step: float = Field(default=1e-3, gt=0)
    """How far a bias moves in one optimizer step."""
    coefficient: float = Field(default=0.0, ge=0)
    """Of the balance loss beside the bias."""


BalanceSettings = Annotated[LossBalanceSettings | BiasBalanceSettings, Field(discriminator="kind")]


class Coefficients(Protocol):
    """The part of MoESettings that the objective needs."""

    @property
    def balance(self) -> LossBalanceSettings | BiasBalanceSettings: ...
    @property
    def z_loss(self) -> float: ...


def load_balance_loss(stats: RoutingStats, counts_E: Tensor | None = None) -> Tensor:
    """E * sum over experts of (share of rows * mean probability): a scalar, 1.0 when both are even.

    Shares sum to 1, so this is 1/K of Hugging Face's `load_balancing_loss_func`. With the `counts_E` of a whole step
    given, the loss is linear in the tokens: the token-weighted mean over micro-batches is the loss of the whole step.
    Source: Switch Transformer, equations 4 to 6.
    """
    counts_E = stats.counts_E if counts_E is None else counts_E
    mean_E = stats.probabilities_NE.sum(dim=0) / max(len(stats.probabilities_NE), 1)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return len(mean_E) * (share_E.to(mean_E.dtype) * mean_E).sum()


def router_z_loss(stats: RoutingStats) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps logits small (ST-MoE, equation 5). Scalar."""
    return stats.logits_NE.logsumexp(dim=-1).square().sum() / max(len(stats.logits_NE), 1)


def balance_objective(all_stats: Sequence[RoutingStats], settings: Coefficients) -> Tensor:
    """The mean over layers of the weighted balance loss and z-loss: a scalar to add to a mean loss over tokens.

    Itself a mean over this micro-batch's tokens: weight it with the micro-batch's share of the step's tokens.
    """
    if not all_stats:
        raise ValueError("balance_objective needs the stats of at least one layer; a dense model has no such objective")
    total = all_stats[0].logits_NE.new_zeros(())
    for stats in all_stats:
        # A term that is off is not computed: 0 * inf would be nan.
        if settings.balance.coefficient:
            total = total + settings.balance.coefficient * load_balance_loss(stats)
        if settings.z_loss:
            total = total + settings.z_loss * router_z_loss(stats)
    return total / len(all_stats)


def bias_update(bias_E: Tensor, counts_E: Tensor, step: float) -> Tensor:
    """The next selection bias: up by `step` for experts below the mean load, down for those above; moves have mean 0.

    `counts_E` are the rows of the whole optimizer step, each token once. Returns a new (E,) tensor.
    """
    counts_E = counts_E.to(bias_E.dtype)
    direction_E = torch.sign(counts_E.mean() - counts_E)
    return bias_E + step * (direction_E - direction_E.mean())


@torch.no_grad()
def update_biases(
    routers: Iterable[Router], counts_LE: Tensor, balance: LossBalanceSettings | BiasBalanceSettings
) -> None:
    """Move every router's bias once, after an optimizer step, by that step's counts (L, E); nothing for kind "loss"."""
    if balance.kind != "bias":
        return
    for router, counts_E in zip(routers, counts_LE, strict=True):
        assert router.bias_E is not None
        router.bias_E.copy_(bias_update(router.bias_E, counts_E, balance.step))


class RoutingMeter:
    """Adds up a step's routing over its micro-batches on the device; reading it is the only wait."""

    def __init__(self) -> None:
        self.counts_LE: Tensor | None = None
        """Rows of each expert in each layer, int64."""
        self.sums_LE: Tensor | None = None
        """Sums over tokens of the probabilities, fp32."""
        self.sums_L3: Tensor | None = None
        """Sums over tokens of the squared logsumexp, of the entropy, and of 1, fp32."""

    @torch.no_grad()
    def add(self, all_stats: Sequence[RoutingStats]) -> None:
        """Count one micro-batch's first forward pass; never a recomputed one."""
        if not all_stats:
            return
        counts_LE = torch.stack([stats.counts_E for stats in all_stats])
        sums_LE = torch.stack([stats.probabilities_NE.detach().sum(dim=0) for stats in all_stats])
        sums_L3 = torch.stack([_sums_3(stats) for stats in all_stats])
        self.counts_LE = counts_LE if self.counts_LE is None else self.counts_LE + counts_LE
        self.sums_LE = sums_LE if self.sums_LE is None else self.sums_LE + sums_LE
        self.sums_L3 = sums_L3 if self.sums_L3 is None else self.sums_L3 + sums_L3

    def tensors(self) -> list[Tensor]:
        """What a run on several ranks adds up in place (all-reduce) before it reads or updates anything."""
        return [t for t in (self.counts_LE, self.sums_LE, self.sums_L3) if t is not None]

    def report(self) -> dict[str, float]:
        """The step's numbers as plain floats; empty when nothing was added. Waits for the device once.

        balance_loss, router_z_loss and router_entropy (1.0: even) are means over layers. max_violation is the busiest
        expert's load over the mean load, minus 1, in the worst layer. dead_experts counts experts without a row, over
        all layers.
        """
        if self.counts_LE is None or self.sums_LE is None or self.sums_L3 is None:
            return {}
        num_experts = self.counts_LE.shape[1]
        tokens_L = self.sums_L3[:, 2].clamp(min=1)
        share_LE = self.counts_LE / self.counts_LE.sum(dim=1, keepdim=True).clamp(min=1)
        balance_L = num_experts * (share_LE * self.sums_LE).sum(dim=1) / tokens_L
        numbers = {
            "balance_loss": balance_L.mean(),
            "router_z_loss": (self.sums_L3[:, 0] / tokens_L).mean(),
            "max_violation": share_LE.max() * num_experts - 1,
            "dead_experts": (self.counts_LE == 0).sum(),
            "router_entropy": (self.sums_L3[:, 1] / tokens_L).mean(),
        }
        return dict(zip(numbers, torch.stack([n.double() for n in numbers.values()]).tolist(), strict=True))


def _sums_3(stats: RoutingStats) -> Tensor:
    logits_NE, probabilities_NE = stats.logits_NE, stats.probabilities_NE
    entropy = torch.special.entr(probabilities_NE).sum() / math.log(max(logits_NE.shape[1], 2))
    return torch.stack(
        [logits_NE.logsumexp(dim=-1).square().sum(), entropy, logits_NE.new_tensor(float(len(logits_NE)))]
    )
