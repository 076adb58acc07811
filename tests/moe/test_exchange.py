"""An exchange between ranks gives what one rank with all experts and all tokens gives; what travels, and when.

The cases run on 1, 2 and 4 gloo ranks (tests/ranks.py); each rank also computes the whole of it by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.dispatch import Dispatcher, LocalDispatcher
from moe.exchange import Exchange, ExchangeParcel, volume
from moe.experts import Experts
from moe.routing import Memo

WIDTH, NUM_EXPERTS = 8, 8
COUNTS = {"even": [9, 9, 9, 9], "an empty rank": [7, 0, 12, 5], "the first rank empty": [0, 6, 1, 9], "nobody": [0] * 4}


def distinct(weights_E: Tensor, num_tokens: int, k: int) -> Tensor:
    return (
        torch.stack([weights_E.multinomial(k) for _ in range(num_tokens)]) if num_tokens else torch.empty(0, k).long()
    )


def some_nowhere(num_tokens: int) -> Tensor:
    chosen_NK = distinct(torch.ones(NUM_EXPERTS), num_tokens, 3)
    chosen_NK[torch.rand(chosen_NK.shape) < 0.4] = NUM_EXPERTS
    chosen_NK[::5] = NUM_EXPERTS + 3  # whole tokens, and any number past the last expert
    return chosen_NK


def all_to_one(num_tokens: int) -> Tensor:
    chosen_NK = torch.full((num_tokens, 2), NUM_EXPERTS)
    chosen_NK[:, 1] = NUM_EXPERTS - 1
    return chosen_NK


ROUTINGS: dict[str, Callable[[int], Tensor]] = {
    "even": lambda n: distinct(torch.ones(NUM_EXPERTS), n, 2),
    "skewed": lambda n: distinct(0.3 ** torch.arange(NUM_EXPERTS), n, 2),
    "empty experts": lambda n: distinct((torch.arange(NUM_EXPERTS) % 3 > 0).float(), n, 3),
    "all to one": all_to_one,
    "all to one rank": lambda n: torch.tensor([[1, 0]]).expand(n, 2).clone(),
    "some nowhere": some_nowhere,
    "nowhere at all": lambda n: torch.full((n, 2), NUM_EXPERTS),
    "K = 1": lambda n: distinct(torch.ones(NUM_EXPERTS), n, 1),
    "K = E": lambda n: distinct(torch.ones(NUM_EXPERTS), n, NUM_EXPERTS),
}


def world() -> tuple[int, int, dist.ProcessGroup]:
    group = dist.group.WORLD
    assert group is not None
    return dist.get_rank(), dist.get_world_size(), group


def experts_of(dtype: torch.dtype = torch.float32) -> tuple[Experts, Experts]:
    """The same experts whole, and this rank's share of them."""
    rank, size, _ = world()
    torch.manual_seed(1)
    whole = Experts(NUM_EXPERTS, WIDTH, 16, "loop").to(dtype)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    own = Experts(NUM_EXPERTS // size, WIDTH, 16, "loop").to(dtype)
    for mine, all_of_it in zip(own.parameters(), whole.parameters(), strict=True):
        mine.data.copy_(all_of_it.detach().chunk(size)[rank])
    return whole, own


def tokens_of(counts: list[int], routing: str, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, ...]]:
    """x, chosen, gates and the gradient of the output, of every rank; the same wherever it is called."""
    torch.manual_seed(2)
    _, size, _ = world()
    drawn = []
    for count in counts[:size]:
        chosen_NK = ROUTINGS[routing](count)
        gates_NK = torch.rand(chosen_NK.shape).where(chosen_NK < NUM_EXPERTS, 0)
        drawn.append((torch.randn(count, WIDTH), chosen_NK, gates_NK, torch.randn(count, WIDTH)))
    return [(x.to(dtype), chosen, gates.to(dtype), grad.to(dtype)) for x, chosen, gates, grad in drawn]


def run_through(dispatcher: Dispatcher, experts: Experts, *drawn: Tensor) -> dict[str, Tensor]:
    """The output and every gradient."""
    x, chosen, gates, grad = drawn
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    experts.zero_grad()
    parcel = dispatcher.send(x, chosen, gates)
    max_rows = parcel.num_slots if isinstance(parcel, ExchangeParcel) else None
    out = parcel.bring_back(experts(*parcel.receive(), max_rows))
    out.backward(grad.to(out.dtype))
    named = {"out": out.detach(), "x": x.grad, "gates": gates.grad}
    named |= {name: p.grad for name, p in experts.named_parameters()}
    return {name: torch.zeros(()) if tensor is None else tensor for name, tensor in named.items()}


def on_one_rank(experts: Experts, drawn: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The same, of all tokens and experts together, cut to what belongs to this rank."""
    rank, size, _ = world()
    x, chosen, gates, grad = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    named = run_through(LocalDispatcher(), experts, x, chosen, gates, grad)
    sizes = [len(part[0]) for part in drawn]
    cut = {name: named[name].split(sizes)[rank] for name in ("out", "x", "gates")}
    return cut | {name: named[name].chunk(size)[rank] for name, _ in experts.named_parameters()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        error = (ours[name].double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: off by {error:.2e}, relative"


@contextmanager
def spying(module: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of every call of a module's function while this lasts."""
    whole, calls = getattr(module, name), []

    def spied(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return whole(*arguments, **named)

    setattr(module, name, spied)
    try:
        yield calls
    finally:
        setattr(module, name, whole)


def case_output_and_gradients_are_those_of_one_rank() -> None:
    rank, _, group = world()
    whole, own = experts_of()
    failures = []
    for name, counts in COUNTS.items():
        for routing in ROUTINGS:
            drawn = tokens_of(counts, routing)
            ours = run_through(Exchange(group, NUM_EXPERTS), own, *drawn[rank])
            try:
                assert_equal(ours, on_one_rank(whole, drawn))
            except AssertionError as error:
                failures.append(f"{name}, {routing}: {error}")
    assert not failures, "\n".join(failures)


def case_every_way_to_multiply_takes_what_comes() -> None:
    """Also where nothing comes, and with no more rows than slots that are here."""
    rank, _, group = world()
    whole, own = experts_of()
    for own.matmul in ("blocked", "bmm", "grouped_mm"):
        for counts, routing in (("an empty rank", "skewed"), ("even", "all to one"), ("nobody", "even")):
            drawn = tokens_of(COUNTS[counts], routing)
            assert_equal(run_through(Exchange(group, NUM_EXPERTS), own, *drawn[rank]), on_one_rank(whole, drawn))


def case_no_gradient_is_needed_to_send() -> None:
    rank, _, group = world()
    whole, own = experts_of()
    drawn = tokens_of(COUNTS["an empty rank"], "skewed")
    with torch.no_grad():
        parcel = Exchange(group, NUM_EXPERTS).send(*drawn[rank][:3])
        out = parcel.bring_back(own(*parcel.receive()))
    assert_equal({"out": out}, {"out": on_one_rank(whole, drawn)["out"]})


def case_numerical_gradients() -> None:
    """Tokens do not see each other, so that all ranks may move their own at the same time."""
    _, _, group = world()
    _, own = experts_of(torch.float64)
    torch.manual_seed(3 + group.rank())
    x, chosen, gates = torch.randn(3, WIDTH).double(), ROUTINGS["some nowhere"](3), torch.rand(3, 3).double()

    def through(x: Tensor, gates: Tensor) -> Tensor:
        parcel = Exchange(group, NUM_EXPERTS).send(x, chosen, gates)
        return parcel.bring_back(own(*parcel.receive()))

    assert torch.autograd.gradcheck(through, (x.requires_grad_(), gates.requires_grad_()))


def case_slots_of_other_ranks_come_without_gate_and_go_nowhere() -> None:
    rank, size, group = world()
    drawn = tokens_of(COUNTS["even"], "even")
    x, chosen, gates, _ = drawn[rank]
    parcel = Exchange(group, NUM_EXPERTS).send(x, chosen, gates)
    x_MD, chosen_MK, gates_MK = parcel.receive()
    local = NUM_EXPERTS // size
    expected = [
        (x[n], [int(e) - rank * local if e // local == rank else local for e in chosen[n]], gates[n])
        for x, chosen, gates, _ in drawn
        for n in range(len(x))
        if any(e // local == rank for e in chosen[n])
    ]
    assert torch.equal(x_MD, torch.stack([x for x, _, _ in expected]))
    assert chosen_MK.tolist() == [numbers for _, numbers, _ in expected]
    assert parcel.num_slots == (chosen_MK < local).sum()
    gates = torch.stack([g for _, _, g in expected])
    assert torch.equal(gates_MK, gates.where(chosen_MK < local, 0)) and (gates_MK > 0).any()


def case_a_token_travels_once_to_a_rank_and_volume_says_how_much() -> None:
    rank, size, group = world()
    _, own = experts_of()
    per_rank, slot_bytes = NUM_EXPERTS // size, 4 + 4
    failures = []
    for routing in ROUTINGS:
        x, chosen, gates, grad = tokens_of(COUNTS["an empty rank"], routing)[rank]
        with spying(dist, "all_to_all_single") as calls:
            run_through(Exchange(group, NUM_EXPERTS), own, x, chosen, gates, grad)
        bytes_away = [
            source[: sum(sizes)].nbytes - source.split(sizes)[rank].nbytes
            for _, source, *split in calls
            if split
            for sizes in [split[1]]
        ]
        # Distinct (token, other rank) pairs, and slots on other ranks, counted by hand.
        owners = [[int(e) // per_rank for e in row if e < NUM_EXPERTS] for row in chosen]
        pairs = sum(len(set(row) - {rank}) for row in owners)
        slots = sum(owner != rank for row in owners for owner in row)
        row_bytes, k = WIDTH * 4, chosen.shape[1]
        there, back = pairs * (row_bytes + k * slot_bytes), pairs * row_bytes
        told = volume(chosen, NUM_EXPERTS, size, row_bytes, rank=rank)
        if (told.there, told.back) != (there, back):
            failures.append(f"{routing}: {told}, not {there}, {back}")
        if (told.there_by_slot, told.back_by_slot) != (slots * (row_bytes + slot_bytes), slots * row_bytes):
            failures.append(f"{routing}: {told} for {slots} slots")
        # Numbers of experts, rows and gates go out; rows of sums and, in the backward pass, two gradients are answers.
        if len(bytes_away) != 7 or sum(bytes_away[:3]) != there:
            failures.append(f"{routing}: sent {bytes_away}, volume says {there}")
        in_all = torch.tensor([bytes_away[3], pairs * row_bytes, bytes_away[4], sum(bytes_away[5:])])
        dist.all_reduce(in_all)
        answered, promised, asked, returned = in_all.tolist()
        if not answered == promised == asked or returned != promised // row_bytes * (row_bytes + 4 * k):
            failures.append(f"{routing}: answers of {in_all.tolist()} bytes")
    assert not failures, "\n".join(failures)


def case_all_that_is_sent_counts_where_no_rank_is_named() -> None:
    _, size, _ = world()
    chosen = torch.tensor([[0, 1], [0, NUM_EXPERTS - 1], [NUM_EXPERTS, NUM_EXPERTS]])
    told = volume(chosen, NUM_EXPERTS, size, 100)
    rows = 2 if size == 1 else 3
    assert (told.there, told.back) == (rows * (100 + 2 * 8), rows * 100)
    assert (told.there_by_slot, told.back_by_slot) == (4 * (100 + 8), 4 * 100)


def case_a_recomputation_keeps_the_layout_and_exchanges_no_sizes() -> None:
    rank, _, group = world()
    whole, own = experts_of()
    drawn = tokens_of(COUNTS["an empty rank"], "skewed")
    x, chosen, gates, grad = drawn[rank]
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    memo, dispatcher = Memo(), Exchange(group, NUM_EXPERTS)

    def through(x: Tensor, gates: Tensor) -> Tensor:
        parcel = dispatcher.send(x, chosen, gates, memo)
        return parcel.bring_back(own(*parcel.receive()))

    with spying(dist, "all_to_all_single") as calls:
        out = checkpoint(through, x, gates, use_reentrant=False)
        first, layout = len(calls), memo.kept["exchange"]
        out.backward(grad)
    assert first == 5, "sizes, numbers of experts, rows, gates, and the way back"
    sent_again = [tuple(source.shape) for _, source, *_ in calls[first:]]
    rows, answers = len(layout.tokens_P), len(layout.chosen_MK)
    k = chosen.shape[1]
    # The gradient of the way back, rows and gates again (no sum is needed a second time), and their gradients.
    assert sent_again == [(rows, WIDTH), (rows, WIDTH), (rows, k), (answers, WIDTH), (answers, k)], sent_again
    assert memo.kept["exchange"] is layout
    ours = {"out": out.detach(), "x": x.grad, "gates": gates.grad}
    assert_equal(ours | {name: p.grad for name, p in own.named_parameters()}, on_one_rank(whole, drawn))


def case_what_stays_is_computed_while_the_rest_travels() -> None:
    """Forward and backward: sent, then the work in between, then waited for."""
    rank, _, group = world()
    _, own = experts_of()
    x, chosen, gates, grad = tokens_of(COUNTS["even"], "even")[rank]
    x, events = x.clone().requires_grad_(), []

    class Between(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            events.append("between")
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            events.append("between")
            return 2 * grad

    class Watched:
        def __init__(self, work: dist.Work) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("waited")
            self.work.wait()

    whole = dist.all_to_all_single

    def watched(*arguments: Any, async_op: bool = False, **named: Any) -> Watched | None:
        events.append("sent" if async_op else "sizes")
        work = whole(*arguments, async_op=async_op, **named)
        return Watched(work) if async_op else None

    try:
        dist.all_to_all_single = watched
        parcel = Exchange(group, NUM_EXPERTS).send(x, chosen, gates.requires_grad_())
        between = Between.apply(x)
        out = parcel.bring_back(own(*parcel.receive()))
        numbers, rows = ["sent", "waited"], ["sent", "sent", "between", "waited", "waited"]
        assert events == ["sizes", *numbers, *rows, "sent", "waited"], events
        events.clear()
        (out + between).backward(grad)
        assert events == ["sent", "waited", *rows], events
    finally:
        dist.all_to_all_single = whole


def case_sums_are_added_in_fp32_and_in_order_of_rank() -> None:
    _, size, group = world()
    per_rank = NUM_EXPERTS // size
    chosen_NK = torch.arange(0, NUM_EXPERTS, per_rank).flip(0).expand(2, size).clone()
    for parts in ([1e8, 1.0, -1e8, 3.0], [256.0, 1.0, 1.0, 1.0]):
        answers = torch.tensor(parts[:size])
        dtype = torch.bfloat16 if parts[0] == 256 else torch.float32
        parcel = Exchange(group, NUM_EXPERTS).send(torch.ones(2, 4, dtype=dtype), chosen_NK, torch.ones(2, size))
        x_MD, _, _ = parcel.receive()
        out = parcel.bring_back(x_MD * answers[group.rank()].to(dtype))
        expected = answers[0]
        for answer in answers[1:]:
            expected = expected + answer
        assert torch.equal(out, torch.full((2, 4), float(expected)).to(dtype)), (out, expected)


def case_the_same_bits_every_time() -> None:
    rank, _, group = world()
    _, own = experts_of()
    drawn = tokens_of(COUNTS["an empty rank"], "skewed")
    one, two = (run_through(Exchange(group, NUM_EXPERTS), own, *drawn[rank]) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def case_low_precision_error_is_at_most_twice_that_of_one_rank() -> None:
    rank, _, group = world()
    whole, own = experts_of()
    drawn = tokens_of([64] * 4, "even")
    exact = on_one_rank(whole.double(), tokens_of([64] * 4, "even", torch.float64))
    whole.float()
    for autocast in (True, False):
        dtype = torch.float32 if autocast else torch.bfloat16
        inputs = [(x.to(dtype), chosen, gates, grad.to(dtype)) for x, chosen, gates, grad in drawn]
        whole.to(dtype), own.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), spying(dist, "all_to_all_single") as calls:
            ours = run_through(Exchange(group, NUM_EXPERTS), own, *inputs[rank])
            plain = on_one_rank(whole, inputs)
        dtypes = [source.dtype for _, source, *split in calls if split]
        low, index, gate = torch.bfloat16, torch.int32, torch.float32
        assert dtypes == [index, low, gate, low, low, low, gate], dtypes
        for name, expected in exact.items():
            scale = expected.norm()
            error, allowed = (ours[name] - expected).norm() / scale, (plain[name] - expected).norm() / scale
            assert error <= 2 * allowed, f"{name}: {error:.1e}, plain {allowed:.1e}"


def case_experts_that_cannot_be_shared_equally_are_refused() -> None:
    _, size, group = world()
    if size > 1:
        with pytest.raises(ValueError, match=f"num_experts=7 cannot be shared equally by {size} ranks"):
            Exchange(group, 7)


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 1, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""
