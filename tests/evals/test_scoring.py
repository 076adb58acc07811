"""Asking a model: every asked token once, the same however the rows are batched, and the model left as it was."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from context.rotary import DefaultRotary
from evals import scoring
from evals.scoring import Cell, Rows, evaluating, score_rows, sources_of, split_documents
from evals.windows import read
from model.initialize import initialize
from model.transformer import ModelSettings, build_model
from settings import Refusal, validate


def some_rows(seed: int = 0, num_rows: int = 7, length: int = 24) -> Rows:
    rng = np.random.default_rng(seed)
    window = rng.integers(0, 256, size=(num_rows, length + 1))
    labels = np.where(rng.random((num_rows, length)) < 0.3, window[:, 1:], -100)
    labels[2] = -100  # a row nothing is asked of
    return Rows(window[:, :-1], labels)


def test_scores_are_the_models_own(models, materials):
    model, rows = models.RandomModel().eval(), some_rows()
    greedy_BT, logprob_BT = score_rows(model, materials, rows)
    with torch.no_grad():
        logits = model(torch.from_numpy(rows.tokens_BT))[0] @ model.head_weight.T
    log_probabilities = torch.log_softmax(logits.double(), dim=-1).numpy()
    for row, place in np.argwhere(rows.labels_BT != -100):
        assert logprob_BT[row, place] == pytest.approx(
            log_probabilities[row, place, rows.labels_BT[row, place]], abs=1e-5
        )
        assert greedy_BT[row, place] == log_probabilities[row, place].argmax()


def test_what_is_not_asked_is_not_answered(models, materials, monkeypatch):
    rows, asked = some_rows(), []
    true_losses = scoring.token_losses
    monkeypatch.setattr(
        scoring, "token_losses", lambda h, w, labels, c: asked.append(len(h)) or true_losses(h, w, labels, c)
    )
    greedy_BT, logprob_BT = score_rows(models.RandomModel(), materials, rows)
    is_asked = rows.labels_BT != -100
    assert (greedy_BT[~is_asked] == -1).all() and np.isnan(logprob_BT[~is_asked]).all()
    assert (greedy_BT[is_asked] >= 0).all() and np.isfinite(logprob_BT[is_asked]).all()
    assert sum(asked) == is_asked.sum()


@pytest.mark.parametrize("budget", [1, 50, 10**6])
def test_batching_changes_nothing(models, materials, budget):
    rows, model = some_rows(), models.RandomModel()
    whole = score_rows(model, materials, rows)
    model.calls.clear()
    parts = score_rows(model, replace(materials, tokens_per_forward=budget), rows)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_allclose(whole[1], parts[1], atol=1e-6)
    assert all(call.tokens_BT.numel() <= max(budget, rows.tokens_BT.shape[1]) for call in model.calls)
    assert sum(len(call.tokens_BT) for call in model.calls) == len(rows.tokens_BT)


def test_model_is_left_as_it_was(models, materials):
    model = nn.Sequential(models.RandomModel(), nn.Dropout(), nn.Dropout())
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model, materials):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), evaluating(model, materials):
        raise RuntimeError
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()


def test_precision_is_the_runs(models, materials):
    model = models.RandomModel()
    bf16 = replace(materials, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    score_rows(model, bf16, some_rows())
    assert all(call.is_autocast and not call.is_grad_enabled for call in model.calls)
    assert not torch.is_autocast_enabled("cpu")


def test_a_model_that_cuts_its_prompt_is_not_scored(models, materials):
    class Cutter(models.RandomModel):
        def forward(self, tokens_BT, positions_BT=None, mask=None):
            return super().forward(tokens_BT[:, -8:], positions_BT, mask)

    with pytest.raises(AssertionError, match="gave"):
        score_rows(Cutter(), materials, some_rows())


def test_documents_end_after_their_end_of_text():
    tokens_BT = np.array([[5, 9, 5, 5, 9, 5], [9, 9, 5, 5, 5, 9]])
    positions_BT, documents = split_documents(tokens_BT, 9)
    assert documents.lengths == (2, 3, 1, 1, 1, 4)
    np.testing.assert_array_equal(positions_BT, [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 2, 3]])


@pytest.mark.parametrize("end_of_text", [None, 9])
def test_whole_rows_need_no_documents(end_of_text):
    tokens_BT = np.array([[5, 5, 9], [5, 5, 5]]) if end_of_text else np.array([[9, 5], [5, 9]])
    assert split_documents(tokens_BT, end_of_text) == (None, None)


def test_cell_survives_its_row():
    cell = Cell("needle", 128, 0.25, 0.9, 20, {"answer_logprob": -0.1})
    row = json.loads(json.dumps(cell.row(step=7, tokens=4096)))
    assert list(row) == ["step", "tokens", "task", "length", "depth", "score", "count", "answer_logprob"]
    assert (row["step"], row["tokens"]) == (7, 4096)
    assert Cell.from_row(row) == cell
    assert math.isnan(Cell.from_row({**row, "score": None}).score)


def test_extra_fields_hide_nothing():
    with pytest.raises(AssertionError, match="length"):
        Cell("needle", 128, None, 1.0, 1, {"length": 3.0}).row(0, 0)


def test_unknown_source_is_refused(materials):
    assert sources_of(materials, (), "key") == ["web", "small"]
    with pytest.raises(Refusal, match=r"evals.needle.haystack='wev' .*did you mean 'web'"):
        sources_of(materials, ("wev",), "evals.needle.haystack")
    with pytest.raises(Refusal, match="no source has held-out text"):
        sources_of(replace(materials, held_out={}), (), "evals.held_out.sources")


def test_a_documents_scores_do_not_depend_on_its_neighbours(materials):
    """Against the real decoder: rows cut into documents score as the documents do alone."""
    attention = {"num_heads": 2, "num_kv_heads": 1}
    settings = validate(
        {"num_layers": 2, "width": 16, "attention": attention, "feed_forward_width": 24}, ModelSettings, ""
    )
    model = build_model(settings, 257)
    initialize(model, 0, "cpu")
    model.use_rotary(DefaultRotary(base=100.0))
    tokens = np.random.default_rng(0).integers(0, 256, 65)
    tokens[[10, 40]] = 256
    rows = read(tokens, np.array([0, 32]), 32, end_of_text=256)
    _, logprob_BT = score_rows(model, materials, rows)
    for start, stop in ((0, 11), (11, 32), (32, 41), (41, 64)):  # a row's end also ends a document
        alone = read(tokens, np.array([start]), stop - start, end_of_text=256)
        expected = score_rows(model, materials, alone)[1][0]
        np.testing.assert_allclose(logprob_BT.ravel()[start:stop], expected, atol=1e-5)
