"""What ranks exchange arrives whole and in its place: over gloo, and over threads that are stricter than any network.

Each `exchange_*` is run by every rank of a group; the cases below run them on gloo ranks (tests/ranks.py).
"""

import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from context.comm import Comm, GroupComm, Handle, neighbours
from context.local_comm import LocalComm
from settings import Refusal


def numbered(*shape: int, rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Distinct numbers for each rank, exact in bf16."""
    total = torch.Size(shape).numel()
    return (torch.arange(total) % 8 + 16 * rank).view(*shape).to(dtype)


def exchange_shift(comm: Comm) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
        for by in (1, 2, -1, comm.size, comm.size + 1):
            sent = numbered(3, 4, rank=comm.rank, dtype=dtype)
            arrived = comm.shift(sent, by).wait()
            assert arrived.dtype == dtype
            assert torch.equal(arrived, numbered(3, 4, rank=(comm.rank - by) % comm.size, dtype=dtype))
            arrived.zero_()
            assert torch.equal(sent, numbered(3, 4, rank=comm.rank, dtype=dtype)), "shares no memory"


def exchange_several_at_once(comm: Comm) -> None:
    """Two shifts and an all-to-all on their way together, waited for in another order."""
    first = comm.shift(numbered(2, 3, rank=comm.rank))
    second = comm.shift(numbered(7, rank=comm.rank), by=-1)
    third = comm.all_to_all([numbered(1, rank=comm.rank)] * comm.size, [(1,)] * comm.size)
    fourth = comm.shift(numbered(2, 3, rank=comm.rank) + 1)
    assert torch.equal(fourth.wait(), numbered(2, 3, rank=(comm.rank - 1) % comm.size) + 1)
    assert [int(t) for t in third.wait()] == [16 * rank for rank in range(comm.size)]
    assert torch.equal(second.wait(), numbered(7, rank=(comm.rank + 1) % comm.size))
    assert torch.equal(first.wait(), numbered(2, 3, rank=(comm.rank - 1) % comm.size))
    assert first.wait() is first.wait(), "asked again, it answers again"


def exchange_what_is_not_contiguous(comm: Comm) -> None:
    sent = numbered(4, 3, rank=comm.rank)
    expected = numbered(4, 3, rank=(comm.rank - 1) % comm.size)
    assert torch.equal(comm.shift(sent.T).wait(), expected.T)
    columns = comm.all_to_all([sent[:, :2]] * comm.size, [(4, 2)] * comm.size).wait()
    everyone = [numbered(4, 3, rank=rank) for rank in range(comm.size)]
    assert all(torch.equal(got, whole[:, :2]) for got, whole in zip(columns, everyone, strict=True))
    assert torch.equal(comm.all_gather(sent.T).wait(), torch.stack([whole.T for whole in everyone]))
    total = sum(whole.T for whole in everyone)
    assert torch.equal(comm.sum(sent.T), total)
    assert torch.equal(comm.sum_scatter(sent.T[:, None].expand(3, comm.size, 4).transpose(0, 1)).wait(), total)
    for result in (comm.shift(sent.T).wait(), comm.all_gather(sent.T).wait(), comm.sum(sent.T)):
        assert result.is_contiguous()


def exchange_uneven(comm: Comm) -> None:
    """Rank s sends s * r tokens to rank r: none from and to rank 0."""
    sent = [numbered(comm.rank * rank, 2, rank=comm.rank) for rank in range(comm.size)]
    arrived = comm.all_to_all(sent, [(comm.rank * rank, 2) for rank in range(comm.size)]).wait()
    for rank, tensor in enumerate(arrived):
        assert torch.equal(tensor, numbered(comm.rank * rank, 2, rank=rank))
    nothing = comm.all_to_all([torch.empty(0, 5)] * comm.size, [(0, 5)] * comm.size).wait()
    assert [tuple(tensor.shape) for tensor in nothing] == [(0, 5)] * comm.size


def exchange_sums(comm: Comm) -> None:
    for dtype in (torch.float32, torch.float64):
        own_W = torch.stack([numbered(2, 3, rank=comm.rank, dtype=dtype) * (rank + 1) for rank in range(comm.size)])
        total = sum(numbered(2, 3, rank=rank, dtype=dtype) for rank in range(comm.size))
        assert torch.equal(comm.sum_scatter(own_W).wait(), total * (comm.rank + 1))
        assert torch.equal(comm.sum(own_W[0]), total)
        assert torch.equal(own_W[0], numbered(2, 3, rank=comm.rank, dtype=dtype)), "what was given stays"
        gathered = comm.all_gather(own_W[0]).wait()
        assert torch.equal(gathered, torch.stack([numbered(2, 3, rank=rank, dtype=dtype) for rank in range(comm.size)]))
    assert comm.all_gather(torch.tensor(comm.rank)).wait().tolist() == list(range(comm.size))
    assert int(comm.sum(torch.tensor(comm.rank))) == sum(range(comm.size))


def exchange_no_graph(comm: Comm) -> None:
    x = numbered(2, rank=comm.rank).requires_grad_()
    assert not comm.shift(x).wait().requires_grad
    assert not comm.all_gather(x).wait().requires_grad
    assert not comm.sum(x).requires_grad
    assert not comm.sum_scatter(torch.stack([x] * comm.size)).wait().requires_grad
    assert not comm.all_to_all([x] * comm.size, [(2,)] * comm.size).wait()[0].requires_grad


def exchange_temporaries(comm: Comm) -> None:
    """Nobody but the handles holds what is on its way."""
    handles: list[Handle] = [comm.shift(numbered(50_000, rank=comm.rank)) for _ in range(8)]
    for handle in handles:
        assert torch.equal(handle.wait(), numbered(50_000, rank=(comm.rank - 1) % comm.size))


def exchange_agreement(comm: Comm) -> None:
    comm.check_same("the same", "words")
    comm.check_same(7, "numbers")
    comm.check_same(b"", "nothing")
    if comm.size > 1:
        with pytest.raises(Refusal, match=rf"disagree on documents: ranks {comm.size - 1} have another than rank 0"):
            comm.check_same(int(comm.rank == comm.size - 1), "documents")
        with pytest.raises(Refusal, match="disagree on lengths"):
            comm.check_same("x" * comm.rank, "lengths")  # of unequal size
    comm.check_same("the same", "words after a refusal")


def exchange_split(comm: Comm) -> None:
    for size in (s for s in range(1, comm.size + 1) if comm.size % s == 0):
        inside, outside = comm.split(size)
        assert (inside.size, outside.size) == (size, comm.size // size)
        assert (inside.rank, outside.rank) == (comm.rank % size, comm.rank // size)
        here, across = neighbours(comm.rank, comm.size, size)
        own = torch.tensor([comm.rank])
        assert inside.all_gather(own).wait().flatten().tolist() == list(here)
        assert outside.all_gather(own).wait().flatten().tolist() == list(across)
        assert inside.shift(own).wait().item() == here[(inside.rank - 1) % size]
        assert outside.shift(own).wait().item() == across[(outside.rank - 1) % outside.size]
        assert comm.split(size)[0] is inside
        assert comm.split(size)[1] is outside
        if size > 1:  # a group of a group
            alone, both = inside.split(1)
            assert (alone.size, both.size) == (1, size)
            assert both.all_gather(own).wait().flatten().tolist() == list(here)
    with pytest.raises(Refusal, match=rf"{comm.size} ranks cannot be split into groups of 3; use one of 1"):
        comm.split(3)


EXCHANGES: dict[str, Callable[[Comm], None]] = {
    name.removeprefix("exchange_"): exchange for name, exchange in globals().items() if name.startswith("exchange_")
}


@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize("name", EXCHANGES)
def test_on_threads(name: str, size: int) -> None:
    LocalComm.run(size, EXCHANGES[name], timeout=20)


def case_every_exchange() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # torch renames collectives; we call the names it has
        comm = GroupComm(dist.group.WORLD, timeout=timedelta(seconds=20))
        for exchange in EXCHANGES.values():
            exchange(comm)


def case_a_handle_holds_what_it_sends_until_it_has_left() -> None:
    """gloo reads from that memory meanwhile; afterwards it is free."""
    comm = GroupComm(dist.group.WORLD)
    x_W = torch.zeros(comm.size, 3)
    place = x_W.untyped_storage().data_ptr()
    for flight in (comm.shift(x_W, 1), comm.all_gather(x_W), comm.sum_scatter(x_W)):
        assert flight.sent is None or flight.sent.untyped_storage().data_ptr() == place
        assert flight.sent is not None or comm.size == 1
        flight.wait()
        assert flight.sent is None
    flight = comm.all_to_all([x_W[0]] * comm.size, [(3,)] * comm.size)
    assert flight.sent.numel() == x_W.numel()
    flight.wait()
    assert flight.sent is None


def case_two_communicators_over_one_group() -> None:
    one, other = GroupComm(dist.group.WORLD), GroupComm(dist.group.WORLD)
    own = torch.tensor([one.rank])
    first, second = one.shift(own), other.shift(own + 100)
    assert second.wait().item() - 100 == first.wait().item() == (one.rank - 1) % one.size


def case_the_time_out_holds_in_the_groups_of_a_split() -> None:
    """Else a rank that does not come would be waited for as long as torch likes, which is half an hour."""
    comm = GroupComm(dist.group.WORLD, timeout=timedelta(seconds=17))
    for part in (*comm.split(1), *comm.split(comm.size), *comm.split(comm.size)[0].split(1)):
        assert part.group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=17)


def case_a_group_of_some_ranks() -> None:
    """Ranks are counted within the group, wherever its members stand in the run."""
    members = sorted(list(range(dist.get_world_size()))[::-2])
    group = dist.new_group(members)
    if dist.get_rank() in members:
        comm = GroupComm(group)
        exchange_shift(comm)
        exchange_uneven(comm)
        inside, outside = comm.split(comm.size)
        assert (inside.size, outside.size) == (comm.size, 1)
        exchange_sums(inside)
    if dist.get_world_size() > 1:  # some ranks have made more groups than others: torch would wait for ever
        with pytest.raises(Refusal, match="how many process groups each of them has made"):
            GroupComm(dist.group.WORLD).split(1)


@pytest.mark.distributed
def test_on_gloo_ranks(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> None:
    for outcomes in run_on_ranks(__file__, 1, 2, 4).values():
        for case, problem in outcomes.items():
            assert not problem, f"{case}: {problem}"


def test_results_come_in_order_of_rank() -> None:
    def work(comm: LocalComm) -> int:
        time.sleep(0.01 * (3 - comm.rank))
        return comm.rank * 10

    assert LocalComm.run(3, work) == [0, 10, 20]


def test_an_exception_of_one_rank_ends_all_with_it() -> None:
    def work(comm: LocalComm) -> None:
        if comm.rank == 1:
            raise KeyError("mine")
        comm.all_gather(torch.zeros(1)).wait()

    with pytest.raises(KeyError, match="mine"):
        LocalComm.run(4, work, timeout=1000)
    assert threading.active_count() < 4 + 1


def test_a_rank_that_leaves_early_is_named_instead_of_waited_for() -> None:
    with pytest.raises(RuntimeError, match="waits for rank 1 in shift by 1, but that one has ended"):
        LocalComm.run(2, lambda comm: comm.shift(torch.zeros(1)).wait() if comm.rank == 0 else None, timeout=1000)


def test_ranks_of_a_split_are_named_as_in_the_run() -> None:
    def work(comm: LocalComm) -> None:
        _, outside = comm.split(2)
        if comm.rank == 1:
            outside.sum(torch.zeros(1))

    with pytest.raises(RuntimeError, match="waits for rank 3 in sum, but that one has ended"):
        LocalComm.run(4, work, timeout=1000)


def test_a_rank_that_does_not_come_in_time_is_named() -> None:
    release = threading.Event()

    def work(comm: LocalComm) -> None:
        if comm.rank == 1:
            release.wait(20)
        else:
            try:
                comm.sum(torch.zeros(1))
            finally:
                release.set()

    with pytest.raises(RuntimeError, match=r"waits for rank 1 in sum, but that one did not come within 0.05 s"):
        LocalComm.run(2, work, timeout=0.05)


def test_calls_and_shapes_that_do_not_match_are_named() -> None:
    def different_calls(comm: LocalComm) -> None:
        (comm.all_gather if comm.rank else comm.shift)(torch.zeros(2)).wait()

    def different_shapes(comm: LocalComm) -> None:
        comm.shift(torch.zeros(2 + comm.rank)).wait()

    with pytest.raises(RuntimeError, match="different calls"):
        LocalComm.run(2, different_calls)
    with pytest.raises(RuntimeError, match=r"expects \([23],\) from rank [01], which sends \([23],\)"):
        LocalComm.run(2, different_shapes)


def test_gradients_are_on_as_in_the_caller_and_flow_in_the_ranks_own_thread() -> None:
    threads: list[int] = []

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            threads.append(threading.get_ident())
            return grad

    def work(comm: LocalComm) -> tuple[int, bool]:
        x = torch.ones(1, requires_grad=True)
        if torch.is_grad_enabled():
            Mark.apply(x).backward()
        assert not torch.autograd.is_multithreading_enabled()
        return threading.get_ident(), torch.is_grad_enabled()

    results = LocalComm.run(3, work)
    assert sorted(threads) == sorted(thread for thread, _ in results)
    assert all(enabled for _, enabled in results)
    with torch.no_grad():
        assert not any(enabled for _, enabled in LocalComm.run(2, work))
