"""Heatmaps: the numbers that were measured, where they were measured, in every rendering."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

from evals.grid import effective_cells, effective_length, make_grid
from evals.heatmap import draw, png
from evals.scoring import Cell
from evals.terminal import coloured, plain, show

LENGTHS, DEPTHS = (64, 128, 256, 512), (0.0, 0.5, 1.0)


def cells(score=lambda length, depth: 1.0 if length <= 128 or depth == 1.0 else 0.25) -> list[Cell]:
    return [Cell("needle", n, d, score(n, d), 20) for n in LENGTHS for d in DEPTHS] + [
        Cell("held_out/web", 64, None, 2.2, 9)
    ]


def test_grid_holds_each_cell_in_its_place():
    grid = make_grid(list(reversed(cells(lambda n, d: n / 1024 + d / 10))), "before", 128)
    assert grid.lengths == LENGTHS and grid.depths == DEPTHS
    for row, depth in enumerate(DEPTHS):
        for column, length in enumerate(LENGTHS):
            assert grid.scores_DL[row, column] == length / 1024 + depth / 10
    assert grid.columns_trained == 2


def test_what_was_not_measured_stays_empty():
    grid = make_grid([cell for cell in cells() if (cell.length, cell.depth) != (256, 0.5)], "hole")
    assert math.isnan(grid.scores_DL[1, 2]) and np.isnan(grid.scores_DL).sum() == 1
    assert " - " in plain(grid) and png([grid])
    with pytest.raises(ValueError, match="no cells of task 'needle'"):
        make_grid([Cell("held_out/web", 64, None, 2.2, 9)], "nothing")


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([1, 1, 1, 1], 512),
        ([1, 0.8, 0.5, 0.2], 128),
        ([0.79, 1, 1, 1], 0),
        ([1, 0.5, 1, 1], 64),
        ([1, 1, math.nan, 1], 128),
    ],
)
def test_effective_length(means, expected):
    of_length = dict(zip(LENGTHS, means, strict=True))
    measured = cells(lambda length, depth: of_length[length])
    assert effective_length(measured) == expected
    assert make_grid(measured, "x").effective_length() == expected
    assert effective_length(measured, threshold=0.0) >= expected


def test_effective_length_is_over_the_mean_of_depths():
    measured = cells(lambda length, depth: {0.0: 0.4, 0.5: 1.0, 1.0: 1.0}[depth])
    assert effective_length(measured, 0.8) == 512 and effective_length(measured, 0.81) == 0
    assert effective_length([]) == 0


def test_effective_lengths_are_cells_of_their_own():
    induction = [Cell("induction", n, None, s, 9) for n, s in ((8, 1.0), (16, 0.9), (32, 0.2))]
    found = effective_cells(
        [*cells(), *induction, Cell("copying", 8, None, 1.0, 4), Cell("held_out/web", 8, None, 1.0, 4)]
    )
    assert [(cell.task, cell.score, cell.length, cell.count) for cell in found] == [
        ("effective_length/needle", 128, 512, 4),
        ("effective_length/induction", 16, 32, 3),
    ]
    assert found[0].extra == {"threshold": 0.8} and effective_cells([]) == []


def test_plain_text_is_ascii_and_marks_the_trained_length():
    text = plain(make_grid(cells(), "after stage 1", 128))
    assert text.isascii() and "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "after stage 1" and lines[1].split() == ["length", "64", "128", "|", "256", "512"]
    assert lines[2].split() == ["0%", "1.00", "1.00", "|", "0.25", "0.25"]
    assert lines[4].split() == ["100%", "1.00", "1.00", "|", "1.00", "1.00"]
    assert "effective length 128" in lines[-1] and "trained at 128" in lines[-1]


@pytest.mark.parametrize(("trained", "bars"), [(None, 0), (32, 0), (64, 4), (200, 4), (512, 4), (9999, 4)])
def test_the_border_stands_after_the_trained_columns(trained, bars):
    body = plain(make_grid(cells(), "x", trained)).splitlines()[1:5]
    assert sum(line.count("|") for line in body) == bars


def test_terminals_get_colours_and_pipes_do_not():
    grids = [make_grid(cells(), "before", 128), make_grid(cells(lambda n, d: 1.0), "after", 512)]
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120, color_system="truecolor")
        show(grids, console)
        text = console.file.getvalue()
        assert ("\x1b[" in text) == is_terminal
        assert "before" in text and "after" in text
        side_by_side = any("before" in line and "after" in line for line in text.splitlines())
        assert side_by_side == is_terminal


def test_good_is_green_and_bad_is_red():
    spans = [
        str(span.style) for span in coloured(make_grid(cells(lambda n, d: d), "x")).spans if " on #" in str(span.style)
    ]
    colours = [tuple(int(style.split("#")[-1][i : i + 2], 16) for i in (0, 2, 4)) for style in spans]
    assert all(red > green for red, green, _ in colours[: len(LENGTHS)])
    assert all(green > red for red, green, _ in colours[-len(LENGTHS) :])


def test_picture_says_what_was_measured():
    before, after = make_grid(cells(), "before", 128), make_grid(cells(lambda n, d: 0.9), "after", 512)
    figure = draw([before, after], "Needle in a haystack")
    left, right, bar = figure.axes
    assert [text.get_text() for text in left.texts].count("0.25") == 4
    assert [text.get_text() for text in right.texts].count("0.90") == 12
    assert [axes.lines[0].get_xdata()[0] for axes in (left, right)] == [2, 4]
    assert left.get_ylim() == (3, 0) and bar.get_ylabel() == "exact match"
    assert png([before, after], "Needle in a haystack")[:8] == b"\x89PNG\r\n\x1a\n"
    assert png([before, after]) == png([before, after])
