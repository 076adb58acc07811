"""Loss by position: a model that knows the text from some position on shows a step there."""

import math
from itertools import pairwise

import pytest
from pydantic import ValidationError

from evals import positions
from evals.positions import PositionsSettings
from settings import Refusal


def test_the_step_stands_where_it_is(models, materials, haystack):
    settings = PositionsSettings(length=128, buckets=4, sources=("web",), tokens=4096)
    cells = positions.run(models.Seer(haystack, start=64), settings, materials, seed=0)
    assert [(cell.extra["start"], cell.extra["stop"]) for cell in cells] == [(0, 32), (32, 64), (64, 96), (96, 128)]
    assert [cell.score for cell in cells] == pytest.approx([math.log2(257), math.log2(257), 0, 0], abs=1e-4)
    assert all(cell.count == 32 * (4096 // 128) and cell.length == 128 and cell.depth is None for cell in cells)


def test_uneven_buckets_hold_every_position_once(models, materials):
    settings = PositionsSettings(length=100, buckets=7, sources=("web",), tokens=1000)
    cells = positions.run(models.RandomModel(), settings, materials, seed=0)
    edges = [(cell.extra["start"], cell.extra["stop"]) for cell in cells]
    assert edges[0][0] == 0 and edges[-1][1] == 100
    assert all(stop == start for (_, stop), (start, _) in pairwise(edges))
    assert sum(cell.count for cell in cells) == 1000


def test_every_window_lies_in_one_document(models, materials):
    model = models.RandomModel()
    positions.run(model, PositionsSettings(length=512), materials, seed=0)
    assert all(call.mask.documents is None and (call.tokens_BT != 256).all() for call in model.calls)


def test_sources_of_short_documents_are_left_out_unless_named(models, materials):
    cells = positions.run(models.RandomModel(), PositionsSettings(length=128), materials, seed=0)
    assert {cell.task for cell in cells} == {"positions/web"}
    with pytest.raises(Refusal, match=r"evals.positions.length=128 .*'small' has \d+ tokens; lower it"):
        positions.check(PositionsSettings(length=128, sources=("web", "small")), materials)
    with pytest.raises(Refusal, match=r"length=5000 .*'web' has 5000 tokens; lower it to 4999"):
        positions.check(PositionsSettings(length=5000), materials)
    positions.check(PositionsSettings(length=4999), materials)


def test_more_buckets_than_positions_are_refused():
    with pytest.raises(ValidationError, match="buckets=9 is more than length=8"):
        PositionsSettings(length=8, buckets=9)
