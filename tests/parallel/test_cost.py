"""Collectives by hand: bytes, links, nodes."""

import math
import random

import pytest

from parallel.cost import (
    Line,
    Link,
    Links,
    exchange_time,
    gather_bytes,
    gather_time,
    line,
    ranks_met,
    reduce_time,
    send_time,
)
from parallel.mesh import Grid

INSIDE, ACROSS = Link(100.0, 1e-3), Link(10.0, 1e-2)
LINKS = Links(INSIDE, ACROSS, ranks_per_node=4, start=1e-4)


def test_an_all_gather_by_hand() -> None:
    whole, four = 400.0, Line(4, 4, LINKS)
    assert gather_bytes(four, whole) == 300, "each rank sends what it has, a quarter, three times"
    assert gather_time(four, whole) == pytest.approx(300 / 100 + 1e-4 + 3 * 1e-3)
    assert reduce_time(four, whole) == 2 * gather_time(four, whole)
    # Over two nodes a ring leaves each node once, and four cards carry it: 40 bytes a second, not 100.
    eight = Line(8, 4, LINKS)
    assert gather_time(eight, whole) == pytest.approx(350 / 40 + 1e-4 + 1e-2 + 6 * 1e-3)
    alone = Line(8, 1, LINKS)
    assert alone.bandwidth == 10, "one rank on each node has one card"
    assert gather_time(Line(1, 1, LINKS), whole) == 0


def test_where_the_ranks_of_an_axis_lie() -> None:
    grid = Grid(size=32, shard=8, expert=4, tensor=2, pipeline=2)
    lines = {axis: line(grid, axis, LINKS) for axis in ("tensor", "shard", "expert", "replicate", "pipeline")}  # type: ignore[arg-type]
    assert {axis: (each.length, each.inside) for axis, each in lines.items()} == {
        "tensor": (2, 2),  # neighbours
        "shard": (8, 2),  # every second rank: two on a node of four
        "expert": (4, 2),
        "replicate": (1, 1),
        "pipeline": (2, 1),  # sixteen apart
    }
    assert [line(Grid(size=n), "data", LINKS).inside for n in (2, 4, 6, 8, 12)] == [2, 4, 2, 4, 4]


def test_the_node_boundary_tells() -> None:
    grid = Grid(size=8, shard=8)
    near, far = (line(grid, "shard", Links(INSIDE, ACROSS, ranks)) for ranks in (8, 4))
    assert near.nodes == 1 and far.nodes == 2
    assert gather_time(far, 1e6) > 2 * gather_time(near, 1e6)


@pytest.mark.parametrize("seed", range(20))
def test_more_bandwidth_and_less_latency_are_never_slower(seed: int) -> None:
    draws = random.Random(seed)
    length = 2 ** draws.randint(1, 6)
    inside = 2 ** draws.randint(0, int(math.log2(length)))
    slow = Links(Link(draws.uniform(1, 10), draws.random()), Link(draws.uniform(1, 10), draws.random()), inside)
    better = [
        Links(Link(slow.inside.bandwidth * 2, slow.inside.latency), slow.across, inside),
        Links(slow.inside, Link(slow.across.bandwidth * 2, slow.across.latency), inside),
        Links(slow.inside, Link(slow.across.bandwidth, slow.across.latency / 2), inside),
    ]
    size, here, there = (draws.uniform(1, 1e3) for _ in range(3))

    def times(links: Links) -> list[float]:
        each = Line(length, inside, links)
        return [gather_time(each, size), exchange_time(each, here, there), send_time(each, size)]

    for links in better:
        assert all(after <= before for after, before in zip(times(links), times(slow), strict=True))


def test_an_exchange_takes_as_long_as_its_slower_way() -> None:
    eight = Line(8, 4, LINKS)
    assert exchange_time(eight, 1000, 10) == pytest.approx(1000 / 100 + 1e-4 + 1e-2)
    assert exchange_time(eight, 10, 1000) == pytest.approx(1000 / 10 + 1e-4 + 1e-2)
    assert exchange_time(Line(1, 1, LINKS), 10, 10) == 0


@pytest.mark.parametrize(("ranks", "experts", "chosen"), [(2, 4, 2), (4, 8, 3), (8, 8, 2), (4, 64, 8), (1, 8, 2)])
def test_how_many_ranks_a_token_meets(ranks: int, experts: int, chosen: int) -> None:
    draws = random.Random(0)
    met = [len({e * ranks // experts for e in draws.sample(range(experts), chosen)}) for _ in range(20_000)]
    assert ranks_met(ranks, experts, chosen) == pytest.approx(sum(met) / len(met), rel=0.01)
    assert ranks_met(2, 4, 4) == 2, "all of them"
