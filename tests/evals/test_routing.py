"""Expert load: known shares come out as known numbers, whatever the micro-batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attention.attention import AttentionSettings
from context.rotary import DefaultRotary
from evals import routing
from evals.routing import RoutingSettings, describe_load
from model.initialize import initialize
from model.transformer import ModelSettings, build_model
from moe.layer import MoESettings
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
    assert describe_load(np.zeros(4, dtype=int))[1]["dead_experts"] == 4  # all rows went to null experts


def test_what_does_not_fit_is_refused(materials):
    with pytest.raises(Refusal, match=r"evals.routing.length=64 .*'small' has 50"):
        routing.check(RoutingSettings(length=64), materials)


def test_shift_is_the_share_of_choices_that_another_rope_leaves(materials):
    settings = ModelSettings(
        num_layers=2,
        width=32,
        attention=AttentionSettings(num_heads=2, num_kv_heads=2),
        moe=MoESettings(num_experts=8, experts_per_token=2, expert_width=16),
    )
    model = build_model(settings, 257)
    initialize(model, 0, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # attention has to matter for positions to matter
    plain, other = DefaultRotary(base=1e4), DefaultRotary(base=10.0)
    model.use_rotary(plain)
    asked = RoutingSettings(length=64, sources=("web",), tokens=1024)
    same = routing.shift(model, asked, materials, 0, plain)
    assert [(cell.task, cell.extra, cell.score) for cell in same] == [
        ("routing_shift/web", {"layer": layer}, pytest.approx(1.0)) for layer in range(2)
    ]
    kept = [cell.score for cell in routing.shift(model, asked, materials, 0, other)]
    assert all(0 < score < 0.999 for score in kept)
    assert model.rotary.spec == plain
