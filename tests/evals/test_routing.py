"""Expert load: known shares come out as known numbers, whatever the micro-batches."""

from dataclasses import replace

import numpy as np
import pytest

from evals import routing
from evals.routing import RoutingSettings, describe_load
from settings import Refusal


def test_one_cell_a_layer(models, materials):
    cells = routing.run(models.RandomModel(experts=5), RoutingSettings(length=64, sources=("web",)), materials, seed=0)
    assert [(cell.task, cell.extra["layer"], cell.length) for cell in cells] == [
        ("routing/web", 0, 64),
        ("routing/web", 1, 64),
    ]
    shared, alone = cells
    assert shared.extra["dead_experts"] == 1 and shared.extra["load_4"] == 0
    assert shared.score == pytest.approx(np.log(4) / np.log(5), rel=0.02)
    assert alone.score == 0 and alone.extra["max_violation"] == 4 and alone.extra["load_0"] == 1
    for cell in cells:
        assert sum(cell.extra[f"load_{expert}"] for expert in range(5)) == pytest.approx(1)


def test_microbatches_change_nothing(models, materials):
    settings = RoutingSettings(length=64, sources=("web",))
    whole = routing.run(models.RandomModel(experts=5), settings, materials, seed=0)
    parts = routing.run(models.RandomModel(experts=5), settings, replace(materials, tokens_per_forward=100), seed=0)
    assert whole == parts


def test_a_dense_model_routes_nothing(models, materials):
    assert routing.run(models.RandomModel(), RoutingSettings(length=32), materials, seed=0) == []


def test_balance_is_one():
    score, extra = describe_load(np.array([7, 7, 7]))
    assert score == pytest.approx(1) and extra["max_violation"] == pytest.approx(0) and extra["dead_experts"] == 0
    assert describe_load(np.array([9]))[0] == 1


def test_what_does_not_fit_is_refused(materials):
    with pytest.raises(Refusal, match=r"evals.routing.length=64 .*'small' has 50"):
        routing.check(RoutingSettings(length=64), materials)
