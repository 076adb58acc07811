"""Which rank has which elements: each is owned once, wherever cuts fall, and cut as torch cuts."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st
from torch import nn

from parallel.layout import Cut, Layout, cut_parameter, whole_layouts
from parallel.mesh import Axis, Grid

GRIDS = (
    Grid(),
    Grid(3, shard=3),
    Grid(4, tensor=4),
    Grid(6, expert=3, tensor=2),
    Grid(8, shard=4, expert=2, tensor=2),
    Grid(8, shard=2, expert=4, pipeline=2),
    Grid(12, shard=3, tensor=2, pipeline=2),
    Grid(16, shard=8, expert=2, tensor=2),
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Grid, Layout]:
    """A grid, and a tensor cut as the model's are: within experts, in blocks, by tensors, by uneven shards on top."""
    grid = draw(st.sampled_from(GRIDS))
    shape = [draw(st.integers(1, 9)) for _ in range(draw(st.integers(1, 3)))]
    stage = draw(st.sampled_from([None, *range(grid.pipeline)]))
    cuts: list[Cut] = []
    if draw(st.booleans()):
        dim, blocks = draw(st.integers(0, len(shape) - 1)), draw(st.sampled_from([1, 2, 3]))
        shape[dim] *= blocks
        cuts.append(Cut("tensor", dim, blocks))
    is_expert = draw(st.booleans())
    if is_expert:
        free = [dim for dim in range(len(shape)) if not cuts or cuts[0].blocks == 1 or dim != cuts[0].dim]
        cuts += [Cut("expert", draw(st.sampled_from(free)))] if free else []
    shard: Axis = "expert_shard" if any(cut.axis == "expert" for cut in cuts) else "shard"
    if draw(st.booleans()):
        cuts.append(Cut(shard, draw(st.integers(0, len(shape) - 1))))
    return grid, Layout(torch.Size(shape), torch.float32, tuple(cuts), stage)


def numbered(layout: Layout) -> torch.Tensor:
    return torch.arange(layout.shape.numel(), dtype=layout.dtype).view(layout.shape)


@trying(max_examples=300, deadline=None)
@given(layouts())
def test_owners_have_every_element_once(drawn: tuple[Grid, Layout]) -> None:
    grid, layout = drawn
    whole = numbered(layout)
    owned = torch.cat([layout.take(whole, grid, rank).flatten() for rank in layout.owners(grid)])
    assert sorted(owned.tolist()) == whole.flatten().tolist()


@trying(max_examples=300, deadline=None)
@given(layouts())
def test_what_is_taken_is_put_back(drawn: tuple[Grid, Layout]) -> None:
    grid, layout = drawn
    whole, again = numbered(layout), torch.full(layout.shape, torch.nan)
    for rank in layout.owners(grid):
        layout.put(again, layout.take(whole, grid, rank), grid, rank)
    assert torch.equal(again, whole)


@trying(max_examples=300, deadline=None)
@given(layouts())
def test_copies_are_counted(drawn: tuple[Grid, Layout]) -> None:
    """So many ranks hold each element, whichever it is."""
    grid, layout = drawn
    whole = numbered(layout)
    holders = [rank for rank in range(grid.size) if layout.has(grid, rank)]
    held = Counter(number for rank in holders for number in layout.take(whole, grid, rank).flatten().tolist())
    assert set(held.values()) == {layout.copies(grid)} and len(held) == whole.numel()


@trying(max_examples=300, deadline=None)
@given(layouts())
def test_shapes_are_known_without_the_tensor(drawn: tuple[Grid, Layout]) -> None:
    grid, layout = drawn
    whole = numbered(layout)
    for rank in range(grid.size):
        assert layout.part_shape(grid, rank) == layout.take(whole, grid, rank).shape


@trying(max_examples=100, deadline=None)
@given(layouts())
def test_ranks_alike_but_for_other_axes_hold_the_same(drawn: tuple[Grid, Layout]) -> None:
    grid, layout = drawn
    whole = numbered(layout)
    parts: dict[tuple[int, ...], torch.Tensor] = {}
    for rank in range(grid.size):
        part = layout.take(whole, grid, rank)
        place = tuple(grid.place(cut.axis, rank) for cut in layout.cuts)
        assert torch.equal(parts.setdefault(place, part), part)


@pytest.mark.parametrize("size", [1, 2, 5, 7, 8, 257])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_stretches_are_those_of_torchs_chunk(size: int, ranks: int) -> None:
    """Which is also how FSDP cuts: see test_fsdp.py, where its own parts are compared."""
    whole, grid = torch.arange(size), Grid(ranks, shard=ranks)
    chunks = [*whole.chunk(ranks), *[whole[:0]] * ranks]
    layout = Layout(whole.shape).cut("shard")
    assert all(torch.equal(layout.take(whole, grid, rank), chunks[rank]) for rank in range(ranks))
    assert layout.owners(grid) == [rank for rank in range(ranks) if len(chunks[rank])]


def test_a_cut_in_blocks_takes_a_part_of_each() -> None:
    grid, whole = Grid(2, tensor=2), torch.arange(8)[:, None]
    layout = Layout(whole.shape).cut("tensor", 0, blocks=2)
    assert [layout.take(whole, grid, rank).flatten().tolist() for rank in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_a_second_cut_is_of_what_the_first_one_left() -> None:
    grid = Grid(4, shard=2, tensor=2)
    layout = Layout(torch.Size([8])).cut("tensor", 0, blocks=2).cut("shard", 0)
    parts = [layout.take(torch.arange(8), grid, rank).tolist() for rank in range(4)]
    assert parts == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_one_stretch_is_a_view_and_no_copy() -> None:
    whole, grid = torch.zeros(6, 4), Grid(2, shard=2)
    part = Layout(whole.shape).cut("shard", 1).take(whole, grid, 1)
    part += 1
    assert whole[:, 2:].eq(1).all() and whole[:, :2].eq(0).all()


def test_a_stage_is_one_place_of_a_pipeline() -> None:
    grid = Grid(8, shard=2, tensor=2, pipeline=2)
    layout = replace(Layout(torch.Size([4])).cut("shard"), stage=1)
    assert [rank for rank in range(8) if layout.has(grid, rank)] == [4, 5, 6, 7]
    assert layout.owners(grid) == [4, 6] and layout.copies(grid) == 2


def test_a_layout_of_each_parameter_and_buffer_that_is_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    layouts = whole_layouts(model)
    assert layouts.keys() == model.state_dict().keys()
    assert layouts["1.num_batches_tracked"].dtype == torch.int64
    assert not layouts["0.weight"].is_cut("shard") and layouts["0.weight"].cut("shard", 1).is_cut("shard")


def test_a_parameter_is_cut_before_it_has_memory() -> None:
    layer = nn.Linear(4, 6, device="meta").requires_grad_(False)
    layout = whole_layouts(layer)["weight"].cut("tensor")
    cut_parameter(layer, "weight", Grid(4, tensor=4), 2, layout)
    assert layer.weight.shape == (2, 4) and layer.weight.is_meta and not layer.weight.requires_grad
