"""Keeping the experts evenly loaded: losses over groups of rows, whatever the cut of the step, and the bias rule."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, Self, TypeVar

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor

from moe.router import Router
from moe.routing import RoutingStats, count_rows
from settings import Refusal, Section


class LossBalanceSettings(Section):
    """A loss that is least when every expert gets its share (Switch Transformer, section 2.2)."""

    kind: Literal["loss"] = "loss"
    scope: Literal["batch", "microbatch", "sequence"] = "batch"
    """Where the load has to be even: over the whole step, over every so many `tokens` of it, or in each row."""
    tokens: int | None = Field(default=None, gt=0, le=2**40)
    """Tokens of a group for scope "microbatch": whole rows, whatever the run's own micro-batches are."""
    coefficient: float = Field(default=0.01, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scope == "microbatch" and self.tokens is None:
            raise ValueError('scope="microbatch" needs tokens, the size of a group; a multiple of the sequence length')
        if self.scope != "microbatch" and self.tokens is not None:
            raise ValueError(
                f'tokens={self.tokens} means nothing for scope="{self.scope}"; leave it out or set scope="microbatch"'
            )
        return self


class BiasBalanceSettings(Section):
    """A selection bias moved against the load after each step, without a gradient (Wang et al. 2024, algorithm 1).

    The mean of all moves is subtracted, which changes no choice and keeps the biases from drifting.
    """

    kind: Literal["bias"] = "bias"
    rule: Literal["sign", "proportional"] = "sign"
    """Whether a bias moves by the sign of its expert's deviation from the mean load, or by the relative deviation."""
    step: float = Field(default=1e-3, gt=0)
    """How far a bias moves in one optimizer step, before the mean of all moves is subtracted."""


BalanceSettings = Annotated[LossBalanceSettings | BiasBalanceSettings, Field(discriminator="kind")]


def _differ(rules: tuple[BalanceSettings, ...]) -> tuple[BalanceSettings, ...]:
    names = ["bias" if rule.kind == "bias" else f'loss of scope="{rule.scope}"' for rule in rules]
    sizes = [None if rule.kind == "bias" else rule.tokens for rule in rules]
    pairs = list(zip(names, sizes, strict=True))
    for name, size in pairs:
        if pairs.count((name, size)) > 1:
            size_text = "" if size is None else f" and tokens={size}"
            raise ValueError(f"{pairs.count((name, size))} rules are a {name}{size_text}; leave one of them")
    return rules


Balances = Annotated[
    tuple[BalanceSettings, ...],
    BeforeValidator(lambda given: tuple(given) if isinstance(given, list | tuple) else (given,)),
    AfterValidator(_differ),
]
"""One rule or a list of them."""


class Coefficients(Protocol):
    """The part of MoESettings that the objective needs."""

    @property
    def balance(self) -> tuple[BalanceSettings, ...]: ...
    @property
    def z_loss(self) -> float: ...


def rows_per_group(loss: LossBalanceSettings, num_rows: int, sequence_length: int) -> int:
    """How many consecutive rows of a step of `num_rows` share one group of this loss.

    Raises Refusal where the `tokens` of a group are no whole rows.
    """
    if loss.scope == "batch":
        return num_rows
    tokens = loss.tokens or sequence_length
    if tokens % sequence_length:
        near = max(1, round(tokens / sequence_length)) * sequence_length
        raise Refusal(
            f"tokens={tokens} must be a multiple of sequence_length={sequence_length}, for a group"
            f" is made of whole rows; try tokens={near}"
        )
    return min(tokens // sequence_length, num_rows)


def count_by_row(stats: RoutingStats, num_rows: int) -> Tensor:
    """How often each expert was wanted in each row, (B, E) int64; padding, and what wanted nothing, is not counted."""
    num_experts = stats.logits_NE.shape[1]
    selected_BR = stats.selected_NK.reshape(num_rows, -1)
    first_B = torch.arange(0, num_rows * num_experts, num_experts, device=selected_BR.device)
    nowhere = num_rows * num_experts
    cells_BR = torch.where(selected_BR < num_experts, selected_BR + first_B[:, None], nowhere)
    return count_rows(cells_BR, nowhere).view(num_rows, num_experts)


def load_balance_loss(
    stats: RoutingStats, counts_BE: Tensor | None = None, num_tokens: Tensor | int | None = None
) -> Tensor:
    """E * sum over tokens n and experts e of share_ne * probability_ne, divided by the tokens: 1.0 when all is even.

    counts_BE: for each of B equal pieces of these tokens, how often its group wanted each expert; share is count over
    the sum of counts. num_tokens: the real tokens of the whole step. Given both, the loss is linear in the tokens, so
    it may be summed over micro-batches and ranks. Left out: these tokens are one group and the whole step.
    Shares sum to 1, so this is 1/K of Hugging Face's `load_balancing_loss_func`. With a selection bias the biased
    choice is counted, as it is what the experts get; DeepSeek-V3 counts the K best without it.
    Source: Switch Transformer, equations 4 to 6; in each row, DeepSeek-V3, equations 17 to 20.
    """
    counts_BE = stats.selected_E[None] if counts_BE is None else counts_BE
    num_tokens = stats.num_real if num_tokens is None else num_tokens
    probabilities_NE = only_real(stats, stats.probabilities_NE)
    num_experts = probabilities_NE.shape[1]
    sums_BE = probabilities_NE.reshape(len(counts_BE), -1, num_experts).sum(dim=1)
    share_BE = counts_BE.to(sums_BE.dtype) / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
    return num_experts * (share_BE * sums_BE).sum() / _at_least_one(num_tokens)


def router_z_loss(stats: RoutingStats, num_tokens: Tensor | int | None = None) -> Tensor:
    """Sum over tokens of logsumexp(logits)^2, divided by the tokens: keeps logits small (ST-MoE, equation 5). Scalar.

    num_tokens: the real tokens of the whole step; left out: those of these stats.
    """
    num_tokens = stats.num_real if num_tokens is None else num_tokens
    return only_real(stats, stats.logits_NE.logsumexp(dim=-1).square()).sum() / _at_least_one(num_tokens)


def only_real(stats: RoutingStats, values: Tensor) -> Tensor:
    """The values (N,) or (N, E) with those of padding set to 0."""
    if stats.is_real_N is None:
        return values
    return torch.where(stats.is_real_N.view(-1, *[1] * (values.ndim - 1)), values, 0.0)


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def as_is(tensor: Tensor) -> Tensor:
    """The sum over ranks where there is one."""
    return tensor


Microbatch = TypeVar("Microbatch")


@dataclass(frozen=True)
class Cut:
    """How this rank holds its part of a step; all ranks have micro-batches of as many consecutive rows."""

    num_rows: int
    """Rows of the whole step, over all ranks."""
    rows_of_microbatches: tuple[int, ...]
    """Rows of each of this rank's micro-batches."""
    sequence_length: int
    """Tokens of a whole row."""
    sum_over_ranks: Callable[[Tensor], Tensor] = as_is
    """Adds a tensor up over all ranks that hold parts of the step; it may work in place."""
    sum_over_shards: Callable[[Tensor], Tensor] = as_is
    """The same over the ranks that hold parts of the very rows of this rank, in the same order."""
    num_layers: int | None = None
    """MoE layers of the whole model, where only some of them are here; left out, those that are seen."""


class StepBalance:
    """The balance losses of one optimizer step: the same gradient however the step is cut.

    Where a group lies in several micro-batches or ranks, its counts must be whole before the first backward pass. So
    `count` those that are to be counted `ahead`, then take the `objective` of the last micro-batch, which completes the
    tables with one exchange between ranks, and then of the others. Where their order is not known, as in a pipeline,
    count all of them and `complete` the tables.
    """

    def __init__(self, settings: Coefficients | None, cut: Cut, num_tokens: Tensor | int) -> None:
        """num_tokens: the real tokens of the whole step. settings: None for a dense model."""
        self.rules = () if settings is None else settings.balance
        # A term that is off is not computed: 0 * inf would be nan.
        self.losses = [rule for rule in self.rules if rule.kind == "loss" and rule.coefficient]
        self.z_loss = 0.0 if settings is None else settings.z_loss
        self.cut, self.num_tokens = cut, num_tokens
        self.group_sizes = [rows_per_group(loss, cut.num_rows, cut.sequence_length) for loss in self.losses]
        self._tables: dict[int, Tensor] = {}
        self._is_complete = False

    @property
    def needs_counts(self) -> bool:
        """Whether some group lies in several micro-batches or ranks."""
        return any(map(self._is_cut, self.group_sizes))

    def ahead(self, microbatches: Sequence[Microbatch]) -> Sequence[Microbatch]:
        """Those of this rank's micro-batches that have to be counted beforehand: all but the last, or none."""
        return microbatches[:-1] if self.needs_counts else ()

    def count(self, all_stats: Sequence[RoutingStats], rows_B: Tensor) -> None:
        """Count a micro-batch beforehand; rows_B: the number of each of its rows in the step."""
        if all_stats:
            self._add(_count_layers(all_stats, len(rows_B)), rows_B)

    def complete(self) -> None:
        """Say that every micro-batch has been counted: their objectives may then be taken in any order."""
        self._exchange()

    def objective(self, all_stats: Sequence[RoutingStats], rows_B: Tensor) -> Tensor:
        """This micro-batch's part of the step's objective, the mean over layers of the weighted terms: a scalar.

        rows_B: the number of each of its rows in the step. The first call is for the micro-batch not counted yet.
        """
        if not all_stats:
            return torch.zeros((), device=rows_B.device)
        counts_LBE = _count_layers(all_stats, len(rows_B))
        if not self._is_complete:
            self._add(counts_LBE, rows_B)
            self._exchange()
        total = all_stats[0].logits_NE.new_zeros(())
        for loss, size in zip(self.losses, self.group_sizes, strict=True):
            for stats, counts_BE in zip(all_stats, self._counts_of_groups(counts_LBE, rows_B, size), strict=True):
                total = total + loss.coefficient * load_balance_loss(stats, counts_BE, self.num_tokens)
        if self.z_loss:
            for stats in all_stats:
                total = total + self.z_loss * router_z_loss(stats, self.num_tokens)
        return total / (self.cut.num_layers or len(all_stats))

    def _is_cut(self, size: int) -> bool:
        """Whether some group of `size` rows lies in several micro-batches or ranks: a function of the sizes alone."""
        return any(num_rows % size for num_rows in self.cut.rows_of_microbatches)

    def _add(self, counts_LBE: Tensor, rows_B: Tensor) -> None:
        """Add a micro-batch to the table (L, groups, E) of each size of groups that are cut."""
        for size in filter(self._is_cut, dict.fromkeys(self.group_sizes)):
            table = _sum_groups(counts_LBE, rows_B // size, -(-self.cut.num_rows // size))
            self._tables[size] = self._tables[size] + table if size in self._tables else table

    def _exchange(self) -> None:
        """Sum the tables over ranks, all in one message."""
        self._is_complete = True
        if self._tables:
            shapes = [table.shape for table in self._tables.values()]
            flat = self.cut.sum_over_ranks(torch.cat([table.flatten() for table in self._tables.values()]))
            parts = flat.split([shape.numel() for shape in shapes])
            self._tables = {
                size: part.view(shape) for size, part, shape in zip(self._tables, parts, shapes, strict=True)
            }

    def _counts_of_groups(self, counts_LBE: Tensor, rows_B: Tensor, size: int) -> Tensor:
        """For each row the counts of its whole group, (L, B, E)."""
        if self._is_cut(size):
            return self._tables[size][:, rows_B // size]
        group_B = torch.arange(len(rows_B), device=rows_B.device) // size
        table = _sum_groups(counts_LBE, group_B, len(rows_B) // size)
        return self.cut.sum_over_shards(table[:, group_B])


def _count_layers(all_stats: Sequence[RoutingStats], num_rows: int) -> Tensor:
    return torch.stack([count_by_row(stats, num_rows) for stats in all_stats])


def _sum_groups(counts_LBE: Tensor, group_B: Tensor, num_groups: int) -> Tensor:
    num_layers, _, num_experts = counts_LBE.shape
    return counts_LBE.new_zeros(num_layers, num_groups, num_experts).index_add_(1, group_B, counts_LBE)


def balance_objective(all_stats: Sequence[RoutingStats], settings: Coefficients, num_rows: int = 1) -> Tensor:
    """The objective of a whole step of `num_rows` rows in one micro-batch: a scalar to add to a mean over tokens."""
    if not all_stats:
        raise ValueError("balance_objective needs the stats of at least one layer; a dense model has no such objective")
    cut = Cut(num_rows, (num_rows,), len(all_stats[0].logits_NE) // num_rows)
    rows_B = torch.arange(num_rows, device=all_stats[0].logits_NE.device)
    return StepBalance(settings, cut, all_stats[0].num_real).objective(all_stats, rows_B)


def bias_update(bias_E: Tensor, counts_E: Tensor, step: float, rule: str = "sign") -> Tensor:
    """The next selection bias: up for experts below the mean load, down for those above, less the mean of these moves.

    counts_E: how often each was wanted in the whole optimizer step, each token once. rule: "sign" moves by `step`,
    "proportional" by `step` times the deviation over the mean. Returns a new (E,) tensor.
    """
    counts_E = counts_E.to(bias_E.dtype)
    mean = counts_E.mean()
    direction_E = BIAS_RULES[rule](mean - counts_E, mean)
    return bias_E + step * (direction_E - direction_E.mean())


BIAS_RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sign": lambda deviation_E, mean: deviation_E.sign(),
    "proportional": lambda deviation_E, mean: deviation_E / mean.clamp(min=torch.finfo(mean.dtype).tiny),
}


@torch.no_grad()
def update_biases(routers: Iterable[Router], counts_LE: Tensor | None, rules: Sequence[BalanceSettings]) -> None:
    """Where a rule moves biases: move every router's once, after an optimizer step, by that step's counts (L, E).

    counts_LE: None where there are no routers.
    """
    for rule in rules:
        if rule.kind == "bias" and counts_LE is not None:
            for router, counts_E in zip(routers, counts_LE, strict=True):
                assert router.bias_E is not None
                router.bias_E.copy_(bias_update(router.bias_E, counts_E, rule.step, rule.rule))
