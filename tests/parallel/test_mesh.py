"""Where ranks stand: the arithmetic against a table of all ranks, and refusals whose ways out are possible."""

import itertools
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st

from parallel.mesh import AXES, Axis, Grid, Mesh, ParallelSettings, build_mesh, divisors, grid_of
from parallel.world import World
from settings import Refusal

EVERY_AXIS: tuple[Axis, ...] = (
    "data",
    "replicate",
    "shard",
    "expert",
    "expert_shard",
    "expert_replicate",
    "tensor",
    "pipeline",
)
CPU = torch.device("cpu")


@st.composite
def settings_that_fit(draw: st.DrawFn) -> tuple[ParallelSettings, int]:
    """Axes of every length, and a number of ranks that they divide."""
    small, factor = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 3]))
    shard, expert = draw(st.permutations([small, small * factor]))
    tensor, pipeline, replicas = (draw(st.sampled_from([1, 2, 3])) for _ in range(3))
    data = max(shard, expert) * replicas
    context = draw(st.sampled_from(divisors(data)))
    axes = {"shard": shard, "expert": expert, "context": context, "tensor": tensor, "pipeline": pipeline}
    return ParallelSettings(**axes), data * tensor * pipeline


def lines(grid: Grid, axis: Axis) -> dict[int, list[int]]:
    """Brute force: ranks laid out as a table of pipeline x data x tensor, whose data ranks are cut up once more."""
    D, T, P = grid.data, grid.tensor, grid.pipeline
    S, E = grid.shard, grid.expert
    table = torch.arange(grid.size).view(P, D, T)
    inner = {
        "data": (1, D, 1),
        "shard": (D // S, S, 1),
        "replicate": (1, D // S, S),
        "expert": (D // E, E, 1),
        "expert_shard": (D // max(S, E), max(S // E, 1), E),
        "expert_replicate": (1, D // max(S, E), max(S, E)),
    }
    if axis == "tensor":
        rows = table.reshape(-1, T)
    elif axis == "pipeline":
        rows = table.flatten(1).T
    else:
        rows = table.reshape(P, *inner[axis], T).movedim(2, -1).flatten(0, -2)
    return {rank: row for row in rows.tolist() for rank in row}


@trying(max_examples=50, deadline=None)
@given(settings_that_fit())
def test_every_axis_parts_the_ranks_as_a_table_of_them_does(fitting: tuple[ParallelSettings, int]) -> None:
    settings, size = fitting
    grid = grid_of(settings, size)
    assert grid.data * grid.tensor * grid.pipeline == size
    for axis in EVERY_AXIS:
        expected = lines(grid, axis)
        for rank in range(size):
            assert grid.along(axis, rank) == expected[rank], axis
            assert expected[rank][grid.place(axis, rank)] == rank, axis
            assert grid.length(axis) == len(expected[rank])


@trying(max_examples=50, deadline=None)
@given(settings_that_fit())
def test_places_along_some_axes_name_a_rank(fitting: tuple[ParallelSettings, int]) -> None:
    settings, size = fitting
    grid = grid_of(settings, size)
    for axes in (
        ("pipeline", "data", "tensor"),
        ("pipeline", "replicate", "shard", "tensor"),
        ("pipeline", "expert_replicate", "expert_shard", "expert", "tensor"),
    ):
        places = {tuple(grid.place(axis, rank) for axis in axes) for rank in range(size)}
        assert len(places) == size
        assert places == set(itertools.product(*(range(grid.length(axis)) for axis in axes)))


@trying(max_examples=50, deadline=None)
@given(settings_that_fit())
def test_experts_are_cut_into_what_shards_leave_of_them(fitting: tuple[ParallelSettings, int]) -> None:
    settings, size = fitting
    grid = grid_of(settings, size)
    if grid.shard >= grid.expert:
        assert grid.length("expert_shard") * grid.expert == grid.shard
        assert grid.length("expert_replicate") == grid.length("replicate")
    else:
        assert grid.length("expert_shard") == 1
    together = grid.expert * grid.length("expert_shard") * grid.length("expert_replicate")
    assert together == grid.data == grid.shard * grid.length("replicate")


def test_ranks_that_hold_rows_together_are_neighbours_among_those_with_tokens() -> None:
    grid = grid_of(ParallelSettings(context=2, tensor=2, pipeline=2), 16)
    stride, length = grid.line("context", 2)
    assert [rank // stride % length for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


@trying(max_examples=50, deadline=None)
@given(settings_that_fit())
def test_replicate_may_be_said_and_has_to_be_true(fitting: tuple[ParallelSettings, int]) -> None:
    settings, size = fitting
    replicas = grid_of(settings, size).length("replicate")
    said = settings.model_copy(update={"replicate": replicas})
    assert grid_of(said, size) == grid_of(settings, size)
    with pytest.raises(Refusal, match=rf"parallel.replicate={replicas + 1}\b.* and this run has {size}; "):
        grid_of(settings.model_copy(update={"replicate": replicas + 1}), size)


def ways_out(message: str, settings: ParallelSettings, size: int) -> Iterator[tuple[ParallelSettings, int]]:
    """What each way that a refusal names comes to."""
    for way in message.rpartition("; ")[2].split(" or "):
        changes: dict[str, int | None] = {
            key: int(value) for key, value in re.findall(r"set parallel\.(\w+)=(\d+)", way)
        }
        changes |= dict.fromkeys(re.findall(r"(?:leave|nothing for) parallel\.(\w+)", way))
        started = re.search(r"start (\d+) of them", way)
        assert changes or started, f"no way out: {way}"
        yield settings.model_copy(update=changes), int(started[1]) if started else size


axis_lengths = st.sampled_from([1, 1, 2, 3, 4, 6, 8])


@trying(max_examples=300, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(AXES, axis_lengths)), st.none() | axis_lengths, st.integers(1, 64))
def test_ways_out_are_possible(axes: dict[str, int], replicate: int | None, size: int) -> None:
    settings = ParallelSettings(replicate=replicate, **axes)
    try:
        grid_of(settings, size)
    except Refusal as refusal:
        ways = list(ways_out(str(refusal), settings, size))
        assert ways
        for changed, ranks in ways:
            grid_of(changed, ranks)


@pytest.mark.parametrize(
    ("axes", "size", "expected"),
    [
        (
            {"shard": 4},
            6,
            "parallel.shard=4 does not divide the 6 ranks of this run; start 4 of them .* parallel.shard=3",
        ),
        (
            {"tensor": 4, "shard": 2},
            6,
            "parallel.tensor=4 .* beside shard 2; start 8 of them .* or set parallel.tensor=3",
        ),
        ({"pipeline": 3, "tensor": 2}, 8, "parallel.pipeline=3 .* beside tensor 2; start 6 .* parallel.pipeline=2"),
        ({"shard": 2, "expert": 3}, 6, "parallel.shard=2 and parallel.expert=3: one has .* set parallel.shard=1$"),
        ({"shard": 6, "expert": 4}, 12, "parallel.shard=6 and parallel.expert=4: .* set parallel.expert=3$"),
        ({"shard": 2, "context": 4}, 6, "parallel.context=4 .* beside shard 2; start 4 of them .* parallel.context=3"),
        (
            {"replicate": 2, "shard": 2},
            6,
            "replicate=2 beside shard 2 is for 4 ranks, and .* 6; start 4 .* or leave para",
        ),
        ({"replicate": 2, "expert": 4}, 2, r"parallel.expert=4 does .* 2 ranks of this run; set parallel.expert=2$"),
    ],
)
def test_ranks_that_cannot_stand_so_are_refused_by_name(axes: dict[str, int], size: int, expected: str) -> None:
    with pytest.raises(Refusal, match=expected):
        grid_of(ParallelSettings(**axes), size)


def test_several_keys_are_changed_where_one_is_not_enough() -> None:
    settings = ParallelSettings(shard=3, tensor=3, replicate=2)
    with pytest.raises(Refusal) as caught:
        grid_of(settings, 4)
    for changed, ranks in ways_out(str(caught.value), settings, 4):
        grid_of(changed, ranks)


@pytest.mark.parametrize(("contexts", "size"), [({3: "context.stages.0.context"}, 8), ({2: "a", 6: "b"}, 4)])
def test_stages_with_too_many_ranks_to_a_row_are_refused_by_their_key(contexts: dict[int, str], size: int) -> None:
    settings = ParallelSettings(shard=4, tensor=1)
    with pytest.raises(Refusal, match=r"does not divide the \d ranks of this run that have tokens") as caught:
        build_mesh(settings, contexts, World(0, size), CPU)
    found = re.search(r"; set ([\w.]+)=(\d+), or start (\d+) of them", str(caught.value))
    assert found is not None
    grid = grid_of(settings, int(found[3]))
    assert all(grid.data % ranks == 0 for ranks in contexts)
    named = {int(found[2]) if key == found[1] else ranks for ranks, key in contexts.items()}
    assert size % (named - contexts.keys()).pop() == 0


def test_one_process_has_no_groups_and_is_all_that_has_tokens() -> None:
    mesh = build_mesh(ParallelSettings(), {1: "parallel.context"}, World(), CPU)
    assert mesh.groups == {} and mesh.dense is None and mesh.experts is None
    assert mesh.data == World() and mesh.group("tensor") is None


def test_ranks_with_the_same_tokens_count_as_one() -> None:
    grid = Grid(12, tensor=2, pipeline=2)
    assert [Mesh(grid, World(rank, 12), {}).data.rank for rank in range(12)] == [0, 0, 1, 1, 2, 2] * 2
    assert all(Mesh(grid, World(rank, 12), {}).data.size == 3 for rank in range(12))
    assert Mesh(Grid(12, shard=4), World(7, 12), {}).data == World(7, 12)
