"""Pictures of one evaluation and of many: each number where it belongs, the trained length marked."""

import math

import numpy as np
import pytest

from evals.grid import make_grid
from evals.heatmap import to_png
from evals.pictures import draw_positions, grids_of, pictures_of
from evals.scoring import Cell
from evals.small_multiples import AT_MOST, draw_over_steps, thin_out

LENGTHS, DEPTHS = (64, 128, 256, 512), (0.0, 0.5, 1.0)


def grids(count: int):
    return [
        make_grid(
            [Cell("needle", n, d, (number + 1) / count * d, 20) for n in LENGTHS for d in DEPTHS], f"{number}M", 128
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_small_multiples_hold_every_grid_in_order(count):
    figure = draw_over_steps(grids(count), "needle over time")
    *small, bar = figure.axes
    assert [axes.get_title(loc="left") for axes in small] == [f"{number}M" for number in range(count)]
    for number, axes in enumerate(small):
        colours = axes.collections[0].get_array()
        np.testing.assert_allclose(np.asarray(colours).reshape(3, 4)[-1], (number + 1) / count)
        assert axes.collections[0].get_clim() == (0, 1) and axes.get_ylim() == (3, 0)
        assert axes.lines[0].get_xdata()[0] == 2
    tops = [round(axes.get_position().y1, 6) for axes in small]
    lefts = [round(axes.get_position().x0, 6) for axes in small]
    assert sorted(zip([-top for top in tops], lefts, strict=True)) == list(
        zip([-top for top in tops], lefts, strict=True)
    )
    assert all(axes.get_position().x0 >= 0 and axes.get_position().x1 <= 1 for axes in figure.axes)
    assert bar.get_ylabel() == "exact match" and to_png(figure) == to_png(
        draw_over_steps(grids(count), "needle over time")
    )


def test_holes_stay_empty_and_no_trained_length_no_line():
    grid = make_grid([Cell("needle", 64, 0.0, math.nan, 1), Cell("needle", 128, 1.0, 0.5, 1)], "x")
    axes = draw_over_steps([grid]).axes[0]
    assert np.ma.count(axes.collections[0].get_array()) == 1 and not axes.lines


def test_of_many_grids_some_are_shown_evenly():
    many = list(range(100))
    thinned = thin_out(many)
    assert len(thinned) == AT_MOST and thinned[0] == 0 and thinned[-1] == 99
    assert set(np.diff(thinned)) <= {4, 5} and thin_out(many[:5]) == many[:5]


def positions(source: str, base: float) -> list[Cell]:
    extras = [{"start": at, "stop": at + 16, "low": base - 0.1, "high": base + 0.1} for at in range(0, 64, 16)]
    return [Cell(f"positions/{source}", 64, None, base - extra["start"] / 100, 9, extra) for extra in extras]


def test_loss_by_position_is_a_line_a_source():
    cells = [*reversed(positions("web", 2.0)), *positions("code", 1.5)]
    axes = draw_positions(cells, trained_length=32).axes[0]
    web, code, trained = axes.lines
    assert (web.get_label(), code.get_label()) == ("web", "code") and trained.get_xdata()[0] == 32
    assert web.get_xdata().tolist() == [8, 24, 40, 56]
    np.testing.assert_allclose(web.get_ydata(), [2.0, 1.84, 1.68, 1.52])
    assert len(axes.collections) == 2
    assert len(draw_positions(cells, trained_length=64).axes[0].lines) == 2


def test_one_evaluation_gives_a_picture_for_what_was_asked():
    needle = [Cell("needle", n, d, 1.0, 20) for n in LENGTHS for d in DEPTHS]
    many = [Cell("needle/multi_key", n, d, 0.5, 20) for n in LENGTHS for d in DEPTHS]
    cells = [*needle, *many, *positions("web", 2.0), Cell("held_out/web", 64, None, 2.2, 9)]
    found = grids_of(cells, "run at step 7", 128)
    assert {task: grid.title for task, grid in found.items()} == {
        "needle": "run at step 7",
        "needle/multi_key": "needle/multi_key, run at step 7",
    }
    assert all(grid.trained_length == 128 for grid in found.values())
    pictures = pictures_of(cells, found, 128)
    assert set(pictures) == {"needle.png", "needle_multi_key.png", "positions.png"}
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())
    assert pictures_of(cells[-1:], {}, None) == {}
