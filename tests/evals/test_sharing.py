"""What rows have in common is read once: fewer tokens go through the model, and every score stays what it is."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from context.rotary import DefaultRotary
from evals import answers, needle, scoring
from evals.needle import NeedleSettings, make_grid
from evals.scoring import Rows, score_rows
from model.initialize import initialize
from model.transformer import ModelSettings, Transformer, build_model
from settings import Refusal, validate
from tests.evals.forwards import counted

T, SHARED = 40, 31
LATENT = {"kind": "latent", "num_heads": 2, "latent_rank": 8}
LATENT |= {"nope_channels": 4, "rope_channels": 4, "value_channels": 6}
CHOICE = {"num_experts": 4, "experts_per_token": 2, "expert_width": 16, "balance": []}
MODELS = {
    "full": {"attention": {"num_heads": 2, "num_kv_heads": 1}},
    "windows": {"attention": {"num_heads": 2, "num_kv_heads": 1, "window": 7}, "pattern": ["window", "full"]},
    "latent": {"attention": LATENT},
    "experts": {
        "attention": {"num_heads": 2, "num_kv_heads": 1},
        "moe": {**CHOICE, "router": {"kind": "expert_choice", "at_eval": "token_choice"}},
    },
}


def decoder(name: str) -> Transformer:
    table = {"num_layers": 2, "width": 16, "feed_forward_width": 24, "initial_std": 0.3, **MODELS[name]}
    model = build_model(validate(table, ModelSettings, ""), 257)
    initialize(model, 0, "cpu")
    model.use_rotary(DefaultRotary(base=100.0))
    return model.eval()


def alone(model: Transformer, materials: scoring.Materials, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Each row scored in a call of its own, where there is nothing to share."""
    one_by_one = [
        score_rows(model, materials, Rows(rows.tokens_BT[row : row + 1], rows.labels_BT[row : row + 1]))
        for row in range(len(rows.tokens_BT))
    ]
    return tuple(np.concatenate(parts) for parts in zip(*one_by_one, strict=True))


def family_rows() -> Rows:
    """Two families of three and four rows, two rows alone, asked here and there, also within what is shared."""
    rng = np.random.default_rng(3)
    window = rng.integers(0, 256, size=(9, T + 1))
    window[1:4, :SHARED], window[5:9, : SHARED - 2] = window[1, :SHARED], window[5, : SHARED - 2]
    window = rng.permutation(window)
    return Rows(window[:, :-1], np.where(rng.random((9, T)) < 0.4, window[:, 1:], -100))


@pytest.mark.parametrize("budget", [5, 2 * T, 10**6])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_each_row_alone(name: str, budget: int, materials) -> None:
    model, rows = decoder(name), family_rows()
    expected_greedy, expected_logprob = alone(model, materials, rows)
    with counted(model) as counts:
        greedy_BT, logprob_BT = score_rows(model, replace(materials, tokens_per_forward=budget), rows)
    assert max(counts) <= max(budget, len(rows.tokens_BT))
    np.testing.assert_array_equal(greedy_BT, expected_greedy)
    np.testing.assert_allclose(logprob_BT, expected_logprob, atol=2e-5)
    assert sum(counts) == 2 * T + SHARED + 3 * (T - SHARED) + (SHARED - 2) + 4 * (T - SHARED + 2)


def test_rows_that_share_nothing_are_read_whole_and_bit_for_bit_as_ever(materials, monkeypatch) -> None:
    model, rng = decoder("full"), np.random.default_rng(0)
    window = rng.integers(0, 256, size=(6, T + 1))
    rows = Rows(window[:, :-1], window[:, 1:])
    monkeypatch.setattr(scoring, "new_cache", None)
    _, logprob_BT = score_rows(model, materials, rows)
    hidden_ND = model(scoring.to_device(rows.tokens_BT, materials.device))[0].detach().flatten(0, 1)
    labels_N = scoring.to_device(rows.labels_BT.ravel(), materials.device)
    losses_N = scoring.token_losses(hidden_ND, model.head_weight, labels_N, scoring.LOGITS_CHUNK)
    np.testing.assert_array_equal(logprob_BT.ravel(), -losses_N.numpy())


def test_rows_cut_into_documents_are_never_read_on_from_a_beginning(materials, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "new_cache", None)
    window = np.zeros((3, T + 1), dtype=np.int64)
    window[:, 20] = 256
    score_rows(decoder("full"), materials, Rows(window[:, :-1], window[:, 1:], end_of_text=256))


def test_a_row_that_is_longer_than_a_forward_is_read_in_chunks(materials) -> None:
    model, rng = decoder("windows"), np.random.default_rng(1)
    window = rng.integers(0, 256, size=(2, T + 1))
    rows = Rows(window[:, :-1], window[:, 1:])
    expected = score_rows(model, materials, rows)
    with counted(model) as counts:
        found = score_rows(model, replace(materials, tokens_per_forward=16), rows)
    assert counts == [16, 16, 8] * 2
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=2e-5)


def grid_settings(**changes) -> NeedleSettings:
    table = {"lengths": (128, 160), "haystack": "web", "samples": 3, "one_haystack": True}
    return NeedleSettings(**{**table, "depths": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), **changes})


@pytest.mark.parametrize("name", ["full", "windows", "latent"])
def test_a_grid_of_depths_costs_about_one_reading_a_length(name: str, materials, monkeypatch) -> None:
    model, settings = decoder(name), grid_settings()
    with counted(model) as shared_counts:
        cells = needle.run(model, settings, materials, seed=0)
    question = 9  # ?AB=1234 and the end of the line; the first letters of keys may agree
    most = sum(settings.samples * (length + 5 * question) for length in settings.lengths)
    assert sum(shared_counts) <= most < 1.4 * settings.samples * sum(settings.lengths)
    monkeypatch.setattr(answers, "score_rows", alone)
    with counted(model) as all_counts:
        unshared = needle.run(model, settings, materials, seed=0)
    assert sum(all_counts) == 6 * 3 * sum(settings.lengths)
    for cell, expected in zip(cells, unshared, strict=True):
        assert (cell.length, cell.depth, cell.score, cell.count) == (
            expected.length,
            expected.depth,
            expected.score,
            expected.count,
        )
        assert cell.extra == pytest.approx(expected.extra, abs=2e-5)


def test_a_copier_finds_the_needle_of_every_depth(models, materials) -> None:
    cells = needle.run(models.CopyOracle(), grid_settings(), materials, seed=0)
    assert [(cell.length, cell.depth) for cell in cells] == [
        (length, depth) for length in (128, 160) for depth in grid_settings().depths
    ]
    assert all(cell.score == 1.0 and cell.count == 3 and cell.extra["needles"] == 6 for cell in cells)


def test_who_sees_so_far_misses_what_lies_beyond(models, materials) -> None:
    """Each question is for the needle at its own depth."""
    settings = grid_settings(lengths=(160,), depths=(0.0, 0.5, 1.0))
    scores = [cell.score for cell in needle.run(models.CopyOracle(reach=60), settings, materials, seed=0)]
    assert scores == [0.0, 0.0, 1.0]
    scores = [cell.score for cell in needle.run(models.CopyOracle(reach=100), settings, materials, seed=0)]
    assert scores == [0.0, 1.0, 1.0]


def test_a_grid_is_a_function_of_its_place_alone(materials) -> None:
    few, many = grid_settings(samples=1), grid_settings(lengths=(128, 333), samples=50)
    grids = [make_grid(settings, materials, 7, length=128, number=0) for settings in (few, many)]
    for one, other in zip(*grids, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    for seed, length, number in ((8, 128, 0), (7, 129, 0), (7, 128, 1)):
        other = make_grid(few, materials, seed, length=length, number=number)
        assert not np.array_equal(other[0].tokens[-9:], grids[0][0].tokens[-9:]), "the same question"


def test_what_a_grid_cannot_be_is_refused(materials) -> None:
    with pytest.raises(ValidationError, match="one_haystack=true hides a needle at each of the depths, not needles=2"):
        grid_settings(needles=2)
    with pytest.raises(Refusal, match=r"evals.needle.lengths=60 does not fit.*needles=6"):
        needle.check(grid_settings(lengths=(60, 128)), materials)
