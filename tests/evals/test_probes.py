"""Probes of random tokens: a model that knows the rule scores 1, one that does not guesses, and neither can cheat."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from evals import copying, induction, k_shot_copy, mqar
from evals.alphabet import alphabet, written_in
from evals.answers import answer_rows
from evals.copying import CopyingSettings
from evals.induction import InductionSettings
from evals.k_shot_copy import KShotCopySettings
from evals.mqar import MqarSettings
from evals.scoring import Materials, Rows
from settings import Refusal

VOCAB = 257


class Rule(nn.Module):
    """Puts first what `say(tokens up to here)` says, with so much confidence; None is no opinion."""

    def __init__(self, say, confidence: float = 30.0) -> None:
        super().__init__()
        self.say, self.confidence = say, confidence
        self.head_weight = nn.Parameter(torch.eye(VOCAB))

    def forward(self, tokens_BT, positions_BT=None, mask=None):
        hidden_BTD = torch.zeros(*tokens_BT.shape, VOCAB)
        for row, tokens in enumerate(tokens_BT.tolist()):
            for place in range(len(tokens)):
                said = self.say(tokens[: place + 1])
                if said is not None:
                    hidden_BTD[row, place, said] = self.confidence
        return hidden_BTD, ()


def induct(tokens):
    """What followed this token the last time."""
    earlier = [place for place in range(len(tokens) - 1) if tokens[place] == tokens[-1]]
    return tokens[earlier[-1] + 1] if earlier else None


def told(tokens):
    """What followed this token the first time."""
    place = tokens.index(tokens[-1])
    return tokens[place + 1] if place < len(tokens) - 1 else None


def match(tokens, depth=4):
    """What followed the last `depth` tokens the last time."""
    for place in range(len(tokens) - 2, depth - 2, -1):
        if tokens[place - depth + 1 : place + 1] == tokens[-depth:]:
            return tokens[place + 1]
    return None


RUNS = {
    "induction": (induction, InductionSettings(lengths=(8, 40), samples=20), induct),
    "mqar": (mqar, MqarSettings(lengths=(16, 40), pairs=(4, 8), vocabulary=30, samples=6), told),
    "copying": (copying, CopyingSettings(lags=(16, 40), samples=5), None),
}


@pytest.mark.parametrize("task", RUNS)
def test_who_knows_the_rule_scores_one_and_who_does_not_guesses(materials, models, task):
    module, settings, rule = RUNS[task]
    knowing = Rule(rule or (lambda tokens: tokens[-16] if len(tokens) <= 32 and len(tokens) >= 16 else None))
    cells = module.run(knowing, settings, materials, seed=1)
    clueless = module.run(Rule(lambda tokens: 255), settings, materials, seed=1)
    assert [cell.task for cell in cells] == [task] * len(cells) and len({(c.length, *c.extra) for c in cells}) > 1
    for cell, blank in zip(cells, clueless, strict=True):
        if task != "copying":
            assert cell.score == 1.0 and cell.extra["answer_logprob"] > -0.01
        assert blank.score == 0.0 and blank.extra["token_accuracy"] == 0.0
        assert blank.extra["low"] == 0.0 and cell.extra["low"] <= cell.score <= cell.extra["high"]


def test_copying_is_scored_by_lag(materials):
    settings = CopyingSettings(lags=(16, 40), samples=5)
    reach = 20
    short_sighted = Rule(lambda tokens: match(tokens[-reach - 3 :]) if len(tokens) > 16 else None)
    near, far = copying.run(short_sighted, settings, materials, seed=0)
    assert (near.length, near.extra["lag"], near.count) == (32, 16, 5)
    assert near.score > 0.7 and far.score < 0.1 and near.extra["loss"] < far.extra["loss"]
    assert far.extra["loss"] == pytest.approx(np.log(VOCAB), rel=0.01)
    exact = copying.run(Rule(lambda tokens: tokens[-16] if len(tokens) >= 16 else None), settings, materials, 0)[0]
    assert exact.score == exact.extra["exact"] == 1.0


def test_mqar_asks_what_fits_and_says_how_many_pairs(materials):
    cells = mqar.run(Rule(told), MqarSettings(lengths=(16, 40), pairs=(4, 8), samples=2), materials, 0)
    assert [(cell.length, cell.extra["pairs"]) for cell in cells] == [(16, 4), (40, 4), (40, 8)]
    half = mqar.run(
        Rule(lambda t: told(t) if len(t) % 4 == 1 else 0),
        MqarSettings(lengths=(64,), pairs=(4, 8), samples=9),
        materials,
        0,
    )
    assert all(0 < cell.score < 1 and cell.extra["exact"] < cell.score for cell in half)


def test_shots_are_what_teaches_to_copy(materials):
    settings = KShotCopySettings(shots=(0, 2), block=5, samples=8)
    ids = alphabet(materials, None, "", at_most=64)

    def copyist(tokens):
        if ids[1] not in tokens:
            return None  # has seen no copy yet
        place = len(tokens) % 12
        return tokens[-6] if 6 <= place <= 10 else int(ids[1]) if place == 11 else None

    none, two = k_shot_copy.run(Rule(copyist), settings, materials, 3)
    assert (none.score, two.score) == (0.0, 1.0) and (none.length, two.length) == (12, 36)
    assert (none.extra["shots"], two.extra["shots"]) == (0, 2)


def test_the_alphabet_is_what_the_model_has_met(materials):
    ids = alphabet(materials, None, "key")
    counts = np.bincount(np.concatenate(list(materials.held_out.values())), minlength=VOCAB)
    assert 256 not in ids and len(ids) == np.count_nonzero(counts[:256])
    assert (np.diff(counts[ids]) <= 0).all() and counts[ids].min() > 0
    assert len(alphabet(materials, None, "key", at_most=5)) == 5
    with pytest.raises(Refusal, match=r"evals.x=99: the held-out text has 30 different tokens"):
        alphabet(materials, 99, "evals.x")
    np.testing.assert_array_equal(alphabet(replace(materials, held_out={}), 16, "key"), np.arange(16))


def test_samples_are_written_in_the_alphabet(materials):
    from data.synthetic import Samples

    rows = written_in(np.array([7, 9, 200]), Samples(np.array([[0, 1, 2]]), np.array([[-100, 2, -100]])))
    assert rows.tokens_BT.tolist() == [[7, 9, 200]] and rows.labels_BT.tolist() == [[-100, 200, -100]]


def test_row_scores_are_told_apart(materials):
    """Two rows: one right in two of three answers, one right in all of two."""
    tokens = np.array([[5, 6, 7, 8], [5, 6, 7, 8]])
    labels = np.array([[6, 7, 9, -100], [-100, 7, 8, -100]])
    answers = answer_rows(Rule(lambda seen: seen[-1] + 1, confidence=2.0), materials, Rows(tokens, labels))
    assert answers.is_exact_S.tolist() == [False, True]
    assert answers.accuracy_S.tolist() == pytest.approx([2 / 3, 1])
    right, wrong = 2 - np.log(np.exp(2) + 256), -np.log(np.exp(2) + 256)
    assert answers.logprob_S.tolist() == pytest.approx([(2 * right + wrong) / 3, right], abs=1e-5)
    whole = answers.cell("x", 4, by="accuracy", extra={"pairs": 2})
    assert whole.score == pytest.approx(5 / 6) and whole.extra["exact"] == 0.5 and whole.extra["pairs"] == 2
    one = answers.cell("x", 4, 0.5, rows=slice(1, 2))
    assert (one.score, one.count, one.depth) == (1.0, 1, 0.5) and "exact" not in one.extra
    with pytest.raises(AssertionError, match="asks for nothing"):
        answer_rows(Rule(lambda seen: 0), materials, Rows(tokens, np.full((2, 4), -100)))


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            lambda m: induction.check(InductionSettings(lengths=(64, 2)), m),
            r"evals.induction.lengths=2 .*use 3 or more",
        ),
        (
            lambda m: mqar.check(MqarSettings(lengths=(14, 64)), m),
            r"evals.mqar.lengths=14 does not fit.*use 16 or more",
        ),
        (
            lambda m: mqar.check(MqarSettings(lengths=(512, 18), pairs=(8, 5)), m),
            r"evals.mqar.lengths=18 does not fit: pairs=5 .*use 20 or more",
        ),
        (
            lambda m: induction.check(InductionSettings(lengths=(64,), vocabulary=99), m),
            r"evals.induction.vocabulary=99",
        ),
        (lambda m: mqar.check(MqarSettings(lengths=(33,)), m), r"evals.mqar.lengths=33 is odd.*use 34"),
        (
            lambda m: mqar.check(MqarSettings(lengths=(32,), pairs=(4, 16)), m),
            r"evals.mqar.pairs=16 does not fit.*is 32",
        ),
        (lambda m: mqar.check(MqarSettings(lengths=(512,), pairs=(64,)), m), r"pairs=64 does not fit.*has 30 tokens"),
        (lambda m: copying.check(CopyingSettings(lags=(1, 8)), m), r"evals.copying.lags=1 does not fit.*use 2 or more"),
        (lambda m: k_shot_copy.check(KShotCopySettings(vocabulary=64), m), r"evals.k_shot_copy.vocabulary=64"),
    ],
)
def test_what_cannot_be_asked_is_refused(materials, check, message):
    with pytest.raises(Refusal, match=message):
        check(materials)


def test_a_run_on_integers_alone_is_asked_in_integers():
    """A source of random tokens has no text to hold out, and its ids mean themselves."""

    class Integers:
        vocab_size, end_of_text = 17, 16

    materials = Materials(Integers(), {}, torch.device("cpu"), contextlib.nullcontext)
    model = Rule(induct)
    (cell,) = induction.run(model, InductionSettings(lengths=(20,), samples=10), materials, 0)
    assert cell.score == 1.0
