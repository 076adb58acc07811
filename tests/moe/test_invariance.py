"""No cut of a step changes the gradient of a balance loss: not micro-batches, data ranks, context shards or recompute.

The reference is the formula as the papers have it, in fp64, over the whole step in one piece; nothing of moe/balance.py
takes part in it. Routers drop rows by capacity, which must not show either.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.balance import Cut, StepBalance
from moe.capacity import CapacitySettings
from moe.layer import MoESettings
from moe.router import Extras, Router, SoftmaxRouterSettings
from moe.routing import Memo, RoutingStats, TokenFacts
from settings import validate

ROWS, LENGTH, WIDTH, EXPERTS, K, LAYERS = 12, 8, 6, 5, 2, 2

BATCH = {"kind": "loss", "coefficient": 0.7}
PAIRS = {"kind": "loss", "scope": "microbatch", "tokens": 2 * LENGTH, "coefficient": 0.4}
FIVES = {"kind": "loss", "scope": "microbatch", "tokens": 5 * LENGTH, "coefficient": 0.9}
SEQUENCE = {"kind": "loss", "scope": "sequence", "coefficient": 0.2}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "batch": {"balance": BATCH},
    "groups of 2 rows": {"balance": PAIRS},
    "groups of 5 rows, the last one smaller": {"balance": FIVES},
    "sequence": {"balance": SEQUENCE},
    "all at once": {"balance": [BATCH, PAIRS, FIVES, SEQUENCE, {"kind": "bias"}], "z_loss": 0.3},
    "z-loss alone": {"balance": [], "z_loss": 0.3},
}


def settings_of(objective: str) -> MoESettings:
    table = {"num_experts": EXPERTS, "experts_per_token": K, "expert_width": 4, **OBJECTIVES[objective]}
    return validate(table, MoESettings, "model.moe")


@dataclass(frozen=True)
class Step:
    """A whole step: for each layer a router and what comes to it."""

    routers: list[Router]
    x_LBTD: list[Tensor]
    is_real_BT: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [*(router.weight for router in self.routers), *self.x_LBTD]


def make_step(seed: int = 0, real_lengths: list[int] | None = None) -> Step:
    """Rows of unlike content, so that unlike groups want unlike experts."""
    torch.manual_seed(seed)
    routers = []
    for layer in range(LAYERS):
        extras = Extras(capacity=CapacitySettings(factor=0.5, drop="position"), layer=layer)
        routers.append(Router(SoftmaxRouterSettings(), WIDTH, EXPERTS, K, extras=extras).double())
        torch.nn.init.normal_(routers[-1].weight)
    rows_B1D = torch.randn(LAYERS, ROWS, 1, WIDTH, dtype=torch.float64)
    x_LBTD = rows_B1D + torch.randn(LAYERS, ROWS, LENGTH, WIDTH, dtype=torch.float64)
    lengths_B = torch.tensor(real_lengths or [LENGTH] * ROWS)
    is_real_BT = torch.arange(LENGTH) < lengths_B[:, None]
    return Step(routers, [x_BTD.clone().requires_grad_() for x_BTD in x_LBTD], is_real_BT)


def one_piece(step: Step, objective: str) -> list[Tensor]:
    """Gradients of the formula over the whole step: the mean of the groups' losses, weighed by their real tokens."""
    settings, total = settings_of(objective), torch.zeros((), dtype=torch.float64)
    is_real_N = step.is_real_BT.flatten()
    for router, x_BTD in zip(step.routers, step.x_LBTD, strict=True):
        logits_NE = x_BTD.flatten(0, 1) @ router.weight.T
        wanted_NE = torch.zeros_like(logits_NE).scatter(1, logits_NE.topk(K).indices, 1.0).detach()
        for rule in settings.balance:
            if rule.kind == "loss":
                size = {"batch": ROWS * LENGTH, "sequence": LENGTH}.get(rule.scope, rule.tokens)
                for group in torch.arange(ROWS * LENGTH).split(size):
                    group = group[is_real_N[group]]
                    f_E = wanted_NE[group].sum(0) / (K * max(len(group), 1))
                    p_E = logits_NE[group].softmax(1).sum(0) / max(len(group), 1)
                    loss = EXPERTS * (f_E * p_E).sum()
                    total = total + rule.coefficient * loss * len(group) / max(is_real_N.sum().item(), 1)
        z_N = logits_NE.exp().sum(1).log()[is_real_N] ** 2
        total = total + settings.z_loss * z_N.sum() / max(len(z_N), 1)
    return list(torch.autograd.grad(total / LAYERS, step.leaves))


def route(step: Step, rows: slice, places: slice, recompute: bool) -> list[RoutingStats]:
    """What the routers make of some rows, or of some places of them."""
    x_LBTD = [x_BTD[rows, places] for x_BTD in step.x_LBTD]
    is_real_BT = step.is_real_BT[rows, places]
    places_BT = torch.arange(LENGTH)[places].expand_as(is_real_BT)
    facts = TokenFacts(torch.zeros_like(places_BT), places_BT, torch.arange(ROWS)[rows], is_real_BT)
    all_stats = []
    for router, x_BTD in zip(step.routers, x_LBTD, strict=True):
        x_ND, memo = x_BTD.flatten(0, 1), Memo()
        if recompute and torch.is_grad_enabled():
            all_stats.append(checkpoint(router, x_ND, facts, memo, use_reentrant=False))
        else:
            all_stats.append(router(x_ND, facts, memo))
    return all_stats


EVERYWHERE = slice(0, LENGTH)


def in_pieces(
    step: Step,
    objective: str,
    pieces: list[slice],
    *,
    sums: dict[str, Callable[[Tensor], Tensor]] | None = None,
    places: slice = EVERYWHERE,
    recompute: bool = False,
) -> list[Tensor]:
    """This rank's gradients when its part of the step is taken piece by piece, as the training loop does."""
    for leaf in step.leaves:
        leaf.grad = torch.zeros_like(leaf)
    sizes = tuple(piece.stop - piece.start for piece in pieces)
    cut = Cut(ROWS, sizes, LENGTH, **(sums or {}))
    balance = StepBalance(settings_of(objective), cut, step.is_real_BT.sum())
    with torch.no_grad():
        for piece in balance.ahead(pieces):
            balance.count(route(step, piece, places, recompute), torch.arange(ROWS)[piece])
    for piece in reversed(pieces):
        balance.objective(route(step, piece, places, recompute), torch.arange(ROWS)[piece]).backward()
    return [leaf.grad for leaf in step.leaves if leaf.grad is not None]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).norm() <= 1e-12 * their.norm(), (our - their).norm() / their.norm()


def equal_pieces(size: int, rank: int = 0, num_ranks: int = 1) -> list[slice]:
    """This rank's micro-batches of `size` rows: every so many of the step's."""
    starts = range(0, ROWS, size)
    return [slice(start, start + size) for start in starts if start // size % num_ranks == rank]


# One process.

CUTS = st.sets(st.integers(1, ROWS - 1)).map(
    lambda inner: [slice(a, b) for a, b in zip([0, *sorted(inner)], [*sorted(inner), ROWS], strict=True)]
)
LENGTHS = st.lists(st.integers(0, LENGTH), min_size=ROWS, max_size=ROWS)


@pytest.mark.parametrize("objective", OBJECTIVES)
@examples(max_examples=20, deadline=None, derandomize=True)
@given(pieces=CUTS, real_lengths=LENGTHS, recompute=st.booleans(), seed=st.integers(0, 99))
def test_any_micro_batches_with_any_padding(
    objective: str, pieces: list[slice], real_lengths: list[int], recompute: bool, seed: int
) -> None:
    step = make_step(seed, real_lengths)
    assert_same(in_pieces(step, objective, pieces, recompute=recompute), one_piece(step, objective))


@pytest.mark.parametrize("objective", ["batch", "groups of 2 rows", "groups of 5 rows, the last one smaller"])
def test_the_groups_matter(objective: str) -> None:
    """Losses of each micro-batch by itself have another gradient: the equality above says something."""
    step, theirs = make_step(), one_piece(make_step(), objective)
    alone = [torch.zeros_like(leaf) for leaf in step.leaves]
    for start in range(ROWS):
        balance = StepBalance(settings_of(objective), Cut(1, (1,), LENGTH), ROWS * LENGTH)
        loss = balance.objective(route(step, slice(start, start + 1), EVERYWHERE, False), torch.zeros(1).long())
        gradients = torch.autograd.grad(loss, step.leaves)
        alone = [total + gradient for total, gradient in zip(alone, gradients, strict=True)]
    for our, their in zip(alone, theirs, strict=True):
        assert (our - their).norm() > 0.05 * their.norm()


def test_capacity_drops_rows_here() -> None:
    for stats in route(make_step(), slice(0, ROWS), EVERYWHERE, False):
        assert (stats.chosen_NK != stats.selected_NK).float().mean() > 0.2


@pytest.mark.parametrize(
    ("objective", "sizes", "must_count", "must_exchange"),
    [
        ("sequence", (1, 1, 1), False, False),
        ("z-loss alone", (3, 3), False, False),
        ("groups of 2 rows", (2, 4, 6), False, False),
        ("groups of 2 rows", (12,), False, False),
        ("groups of 2 rows", (3, 3), True, True),
        ("batch", (12,), False, False),
        ("batch", (6,), False, True),
        ("batch", (6, 6), True, True),
        ("all at once", (12,), False, True),
    ],
)
def test_a_second_pass_and_an_exchange_only_where_a_group_is_cut(
    objective: str, sizes: tuple[int, ...], must_count: bool, must_exchange: bool
) -> None:
    """Of 12 rows. The groups of 5 of "all at once" end with a smaller one, so that they never count as whole."""
    messages: list[int] = []

    def exchange(tensor: Tensor) -> Tensor:
        messages.append(tensor.numel())
        return tensor

    cut = Cut(ROWS, sizes, LENGTH, sum_over_ranks=exchange)
    balance = StepBalance(settings_of(objective), cut, ROWS * LENGTH)
    assert list(balance.ahead(sizes)) == (list(sizes[:-1]) if must_count else [])
    step = make_step()
    for _ in range(2):
        balance.objective(route(step, slice(0, sizes[0]), EVERYWHERE, False), torch.arange(sizes[0]))
    assert len(messages) == must_exchange, "one message a step"


# Several gloo ranks; each also computes the whole by itself.

PADDED = [8, 8, 3, 8, 0, 8, 5, 8, 8, 1, 8, 7]


def all_sum(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def summed(ours: list[Tensor]) -> list[Tensor]:
    """The gradients of the whole step: inputs are rows of one rank, or parts of rows, and 0 elsewhere."""
    return [all_sum(gradient.clone()) for gradient in ours]


def every_objective() -> Iterator[tuple[str, Step, list[Tensor]]]:
    step = make_step(3, PADDED)
    for objective in OBJECTIVES:
        yield objective, step, one_piece(step, objective)


def case_data_ranks() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    sums = {"sum_over_ranks": all_sum}
    for objective, step, theirs in every_objective():
        for rows in (rows for rows in (1, 3, 6) if ROWS % (rows * size) == 0):
            pieces = equal_pieces(rows, rank, size)
            assert_same(summed(in_pieces(step, objective, pieces, sums=sums, recompute=rows == 3)), theirs)


def case_context_shards() -> None:
    """All ranks hold the same rows, each a part of their places."""
    rank, share = dist.get_rank(), LENGTH // dist.get_world_size()
    sums = {"sum_over_ranks": all_sum, "sum_over_shards": all_sum}
    places = slice(rank * share, (rank + 1) * share)
    for objective, step, theirs in every_objective():
        for rows in (3, 12):
            ours = in_pieces(step, objective, equal_pieces(rows), sums=sums, places=places)
            assert_same(summed(ours), theirs)


def case_data_ranks_of_context_shards() -> None:
    """Neighbours share rows, pairs of neighbours share the step; on 2 ranks, there is one pair."""
    rank, num_pairs = dist.get_rank(), dist.get_world_size() // 2
    pairs = [dist.new_group([2 * pair, 2 * pair + 1]) for pair in range(num_pairs)]

    def pair_sum(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=pairs[rank // 2])
        return tensor

    sums = {"sum_over_ranks": all_sum, "sum_over_shards": pair_sum}
    half = LENGTH // 2
    places = slice(0, half) if rank % 2 == 0 else slice(half, LENGTH)
    for objective, step, theirs in every_objective():
        for rows in (2, 6):
            pieces = equal_pieces(rows, rank // 2, num_pairs)
            assert_same(summed(in_pieces(step, objective, pieces, sums=sums, places=places)), theirs)


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""
