"""What a far beginning is worth: tasks that read the same tokens with less and with more before them."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from evals import last_tokens, long_ppl, positions, routing_positions
from evals.last_tokens import LastTokensSettings, seen_through
from evals.long_documents import long_windows, sources_with_long_documents
from evals.long_ppl import LongPplSettings, truncated
from evals.positions import PositionsSettings
from evals.routing_positions import RoutingPositionsSettings, count_choices
from evals.scoring import score_rows
from settings import Refusal

VOCAB = 257


class Grower(nn.Module):
    """The more it has seen of its row, the surer it is of each token's right successor, which it is told."""

    def __init__(self, follows, sure_of) -> None:
        super().__init__()
        self.follows, self.sure_of = follows, sure_of
        self.head_weight = nn.Parameter(torch.eye(VOCAB))
        self.seen = []

    def forward(self, tokens_BT, positions_BT=None, mask=None):
        self.seen.append(tokens_BT.numpy().copy())
        hidden_BTD = torch.zeros(*tokens_BT.shape, VOCAB)
        for row, tokens in enumerate(tokens_BT.tolist()):
            for place in range(7, len(tokens)):
                right = self.follows[tuple(tokens[place - 7 : place + 1])]
                hidden_BTD[row, place, right] = self.sure_of(place + 1)
        return hidden_BTD, ()


@pytest.fixture
def follows(haystack, models):
    return models.Seer(haystack).follows


def test_windows_lie_inside_long_documents(materials, haystack):
    rows = long_windows(materials, "web", 600, 6000, seed=1)
    assert rows.tokens_BT.shape == (10, 600) and 256 not in rows.tokens_BT and rows.end_of_text is None
    text = haystack.tobytes()
    for tokens, labels in zip(rows.tokens_BT, rows.labels_BT, strict=True):
        assert tokens.astype(np.uint16).tobytes() in text
        np.testing.assert_array_equal(tokens[1:], labels[:-1])


def test_what_holds_no_long_document_is_refused(materials):
    assert sources_with_long_documents(materials, (), 600, "x") == ["web"]
    with pytest.raises(Refusal, match=r"evals.x.length=600 .*source 'small' has 50 tokens; lower it to 49"):
        sources_with_long_documents(materials, ("web", "small"), 600, "x")
    for module, settings in (
        (last_tokens, LastTokensSettings(length=9999)),
        (long_ppl, LongPplSettings(length=9999)),
        (positions, PositionsSettings(length=9999)),
        (routing_positions, RoutingPositionsSettings(length=9999)),
    ):
        task = module.__name__.removeprefix("evals.")
        with pytest.raises(Refusal, match=rf"evals.{task}.length=9999 does not fit"):
            module.check(settings, materials)


def test_last_tokens_are_the_same_whatever_is_seen(materials):
    whole = long_windows(materials, "web", 64, 256, seed=0)
    for length in (16, 32, 64):
        rows = seen_through(whole, length, 8)
        assert rows.tokens_BT.shape == (4, length)
        np.testing.assert_array_equal(rows.tokens_BT, whole.tokens_BT[:, 64 - length :])
        np.testing.assert_array_equal(rows.labels_BT[:, -8:], whole.labels_BT[:, -8:])
        assert (rows.labels_BT[:, :-8] == -100).all()


def test_last_tokens_say_what_more_context_gains(materials, follows):
    model = Grower(follows, lambda seen: 4.0 * (seen > 32) + 4.0 * (seen > 56))
    settings = LastTokensSettings(length=64, last=8, tokens=640, sources=("web",))
    quarter, half, whole = last_tokens.run(model, settings, materials, seed=2)
    assert [cell.length for cell in (quarter, half, whole)] == [16, 32, 64] and quarter.task == "last_tokens/web"
    assert quarter.count == half.count == whole.count == 10 * 8 and whole.extra["window"] == 64
    blank = math.log2(VOCAB)
    assert quarter.score == half.score == pytest.approx(blank, abs=1e-4)
    sure = (math.log(math.exp(8) + 256) - 8) / math.log(2)
    assert whole.score == pytest.approx(sure, abs=1e-4) and whole.extra["loss"] == pytest.approx(
        sure * math.log(2), abs=1e-5
    )
    assert whole.extra["gain"] == pytest.approx(blank - sure, abs=1e-4) and half.extra["gain"] == 0
    assert whole.extra["gain_low"] <= whole.extra["gain"] <= whole.extra["gain_high"] and "gain" not in quarter.extra


def test_last_tokens_refuse_what_the_shortest_view_does_not_hold():
    assert last_tokens.num_last(LastTokensSettings(length=64)) == 8
    with pytest.raises(ValidationError, match=r"last=20 tokens do not fit the shortest window.*use 16"):
        LastTokensSettings(length=64, last=20)
    with pytest.raises(ValidationError, match=r"length=3 does not fit: .*0.25 of it, holds no token; use 4 or more"):
        LastTokensSettings(length=3)
    LastTokensSettings(length=4)
    assert [last_tokens.num_seen(share, 1000) for share in (0.3, 0.7, 0.29)] == [300, 700, 290], "as it is written"
    with pytest.raises(ValidationError, match=r"shares=\[0.5, 0.501\] of length=64 are \[32, 32\] tokens"):
        LastTokensSettings(length=64, shares=(0.5, 0.501))
    for shares in ((0.0, 1.0), (0.5, 1.5), (0.5, 0.5), ()):
        with pytest.raises(ValidationError):
            LastTokensSettings(length=64, shares=shares)


def test_truncated_contexts_hold_what_was_published(materials, follows):
    """Token p of the text is judged from the last start + short <= p on, starts a stride apart."""
    model = Grower(follows, lambda seen: 0.01 * seen)
    rows = long_windows(materials, "web", 50, 100, seed=0)
    rows.labels_BT[:, : 16 - 1] = -100
    logprob_BT = truncated(model, materials, rows, short=16, stride=6)
    assert np.isnan(logprob_BT[:, :15]).all() and np.isfinite(logprob_BT[:, 15:]).all()
    for place in range(15, 50):
        seen = place + 1 - (place + 1 - 16) // 6 * 6
        assert 16 <= seen < 22
        expected = 0.01 * seen - math.log(math.exp(0.01 * seen) + 256)
        np.testing.assert_allclose(logprob_BT[:, place], expected, atol=1e-5)


def test_long_ppl_is_over_the_tokens_that_the_beginning_helps(materials, follows):
    """Sure (8) from place 40 on, half sure (3.5) from 32 on, else blank: key are the places from 40 on alone."""
    model = Grower(follows, lambda seen: 8.0 if seen > 40 else 3.5 if seen > 32 else 0.0)
    settings = LongPplSettings(length=64, tokens=640, sources=("web",), stride=4)
    (cell,) = long_ppl.run(model, settings, materials, seed=0)
    sure = math.log(math.exp(8) + 256) - 8
    assert cell.task == "long_ppl/web" and cell.extra["short"] == 16 and cell.length == 64
    assert cell.count == 10 * 24 and cell.extra["key_share"] == pytest.approx(24 / 49)
    assert cell.score == pytest.approx(math.exp(sure), rel=1e-4) and cell.extra["loss"] == pytest.approx(sure, rel=1e-3)
    half, blank = math.log(math.exp(3.5) + 256) - 3.5, math.log(VOCAB)
    assert cell.extra["perplexity"] == pytest.approx(math.exp((24 * sure + 8 * half + 17 * blank) / 49), rel=1e-4)
    kinder = settings.model_copy(update={"least_logprob": -3.0})  # half sure is -2.17 nats
    assert long_ppl.run(model, kinder, materials, seed=0)[0].count == 10 * 32
    harsher = settings.model_copy(update={"gain": 6.0})
    assert long_ppl.run(model, harsher, materials, seed=0)[0].count == 0


def test_without_a_key_token_there_is_no_perplexity(materials, models):
    cells = long_ppl.run(models.RandomModel(), LongPplSettings(length=64, tokens=128, sources=("web",)), materials, 0)
    assert math.isnan(cells[0].score) and cells[0].count == 0 and cells[0].extra["key_share"] == 0.0
    assert "low" not in cells[0].extra
    with pytest.raises(ValidationError, match="short=64 must be less than length=64; use length=65"):
        LongPplSettings(length=64, short=64)


def test_losses_carry_intervals_over_windows(materials, models):
    settings = PositionsSettings(length=64, buckets=4, tokens=640, sources=("web",))
    for cell in positions.run(models.RandomModel(), settings, materials, seed=0):
        assert cell.extra["low"] < cell.score < cell.extra["high"]


def test_long_rows_are_read_in_chunks_like_others(materials, models):
    """A window that is one document is no row of documents: nothing parts it, whatever its length."""
    rows = long_windows(materials, "web", 64, 128, seed=0)
    model = models.RandomModel()
    score_rows(model, materials, rows)
    assert all(call.mask.documents is None for call in model.calls)


def test_experts_by_position(materials, models):
    model = models.RandomModel(experts=4)
    model.route = lambda tokens_BT, layer: torch.where(
        torch.arange(tokens_BT.shape[1]) < 32, 0 if layer else 1, 2
    ).repeat(len(tokens_BT))
    settings = RoutingPositionsSettings(length=64, buckets=4, tokens=256, sources=("web",))
    cells = routing_positions.run(model, settings, materials, seed=0)
    assert [(cell.extra["layer"], cell.extra["start"], cell.extra["stop"]) for cell in cells] == [
        (layer, start, start + 16) for layer in (0, 1) for start in (0, 16, 32, 48)
    ]
    assert [cell.extra["overlap"] for cell in cells] == [1, 1, 0, 0] * 2 and all(cell.count == 64 for cell in cells)
    assert [cell.extra["load_1"] for cell in cells] == [1, 1, 0, 0, 0, 0, 0, 0] and cells[0].score == 0
    assert routing_positions.run(models.RandomModel(), settings, materials, seed=0) == []


def test_choices_are_counted_where_they_fell():
    selected_NK = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 0]])  # 3: none wanted
    counts = count_choices(selected_NK, 3, torch.tensor([0, 0, 1, 1]))
    assert counts.tolist() == [[1, 2, 1], [2, 0, 1]]
