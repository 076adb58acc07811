"""Needles: a model that copies scores 1, one that guesses 0, one that sees so far fails beyond."""

import math
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from evals import needle
from evals.needle import NeedleSettings, make_sample, to_rows
from settings import Refusal


def settings(**changes) -> NeedleSettings:
    return NeedleSettings(**{"lengths": (48, 96, 192), "haystack": "web", "samples": 4, **changes})


@pytest.mark.parametrize("needles", [1, 3])
def test_a_copier_finds_every_needle(models, materials, needles):
    cells = needle.run(models.CopyOracle(), settings(needles=needles, lengths=(64, 200)), materials, seed=0)
    assert [(cell.length, cell.depth) for cell in cells] == [(n, d) for n in (64, 200) for d in (0, 0.25, 0.5, 0.75, 1)]
    for cell in cells:
        assert cell.task == "needle" and cell.score == 1.0 and cell.count == 4
        assert cell.extra["answer_logprob"] == pytest.approx(0, abs=1e-6)
        assert cell.extra["token_accuracy"] == 1.0 and cell.extra["needles"] == needles


def test_a_guesser_finds_none(models, materials):
    cells = needle.run(models.RandomModel(), settings(samples=10), materials, seed=0)
    assert all(cell.score == 0.0 for cell in cells)
    accuracy = np.mean([cell.extra["token_accuracy"] for cell in cells])
    logprob = np.mean([cell.extra["answer_logprob"] for cell in cells])
    assert accuracy < 0.05 and logprob == pytest.approx(-math.log(257), abs=0.5)


def test_who_sees_so_far_fails_beyond(models, materials):
    cells = needle.run(models.CopyOracle(reach=60), settings(), materials, seed=0)
    for cell in cells:
        distance = (1 - cell.depth) * (cell.length - 18) + 10  # haystack after the needle, rest of needle and question
        assert cell.score == (1.0 if distance <= 60 else 0.0), (cell.length, cell.depth)


def test_one_wrong_digit_is_a_miss(models, materials):
    class Slips(models.CopyOracle):
        """Forgets the last digit of every answer."""

        def forward(self, tokens_BT, positions_BT=None, mask=None):
            hidden_BTD, stats = super().forward(tokens_BT, positions_BT, mask)
            hidden_BTD[:, -3] = 0
            return hidden_BTD, stats

    cells = needle.run(Slips(), settings(), materials, seed=0)
    assert all(cell.score == 0 and cell.extra["token_accuracy"] == 0.75 for cell in cells)
    assert all(cell.extra["answer_logprob"] == pytest.approx(-math.log(257) / 4, abs=1e-4) for cell in cells)


def test_samples_do_not_depend_on_their_company(materials):
    few, many = settings(), settings(lengths=(96, 333), depths=(0.5,), samples=50)
    alone = make_sample(few, materials, 7, length=96, depth=0.5, number=3)
    other = make_sample(many, materials, 7, length=96, depth=0.5, number=3)
    np.testing.assert_array_equal(alone.tokens, other.tokens)
    for changes in ({"length": 97}, {"depth": 0.25}, {"number": 4}):
        place = {"length": 96, "depth": 0.5, "number": 3} | changes
        assert not np.array_equal(alone.tokens, make_sample(few, materials, 7, **place).tokens)
    assert not np.array_equal(alone.tokens, make_sample(few, materials, 8, length=96, depth=0.5, number=3).tokens)


def test_only_the_answer_is_asked(materials):
    samples = [make_sample(settings(), materials, 0, length=96, depth=d, number=0) for d in (0.0, 0.5, 1.0)]
    rows = to_rows(samples)
    for sample, tokens_T, labels_T in zip(samples, rows.tokens_BT, rows.labels_BT, strict=True):
        assert len(tokens_T) == 96
        asked = labels_T[labels_T != -100]
        np.testing.assert_array_equal(asked, sample.tokens[sample.answer])
        text = materials.tokenizer.decode(tokens_T)
        value = materials.tokenizer.decode(asked)
        assert len(value) == 4 and text.endswith(f"={value}\n") and text.count(f"={value}") == 2


def test_answers_of_several_lengths_in_one_batch(models, materials):
    """A tokenizer may cut one number into two tokens and the next into four."""
    sample = make_sample(settings(), materials, 0, length=96, depth=0.5, number=0)
    shorter = replace(sample, answer=slice(sample.answer.start + 2, sample.answer.stop))
    rows = to_rows([sample, shorter])
    assert (rows.labels_BT != -100).sum(axis=1).tolist() == [4, 2]


def test_what_does_not_fit_is_refused(materials):
    with pytest.raises(Refusal, match=r"evals.needle.lengths=51 .*'small' has 50 held-out tokens; lower it to 50"):
        needle.check(settings(lengths=(32, 51), haystack="small"), materials)
    for needles in (1, 3):
        least = 10 + 11 * needles
        with pytest.raises(Refusal, match=rf"evals.needle.lengths={least - 1} does not fit: .*use {least} or more"):
            needle.check(settings(lengths=(64, least - 1), needles=needles), materials)
        needle.check(settings(lengths=(least, 64), needles=needles), materials)
        make_sample(settings(needles=needles), materials, 0, length=least, depth=0.5, number=0)
    with pytest.raises(Refusal, match=r"evals.needle: needles=25 need different keys"):
        needle.check(settings(needles=25, key_letters=1, lengths=(2000,)), materials)
    with pytest.raises(Refusal, match=r"evals.needle.haystack='wen' .*did you mean 'web'"):
        needle.check(settings(haystack="wen"), materials)
    for wrong in ({"depths": (0.5, 1.5)}, {"depths": ()}, {"lengths": (64, 64)}, {"samples": 0}):
        with pytest.raises(ValidationError):
            settings(**wrong)


def test_a_sample_cut_short_is_never_scored(materials, monkeypatch):
    true_sample = needle.needle_sample

    def cut(*args, **kwargs):
        sample = true_sample(*args, **kwargs)
        return replace(sample, tokens=sample.tokens[5:])

    monkeypatch.setattr(needle, "needle_sample", cut)
    with pytest.raises(AssertionError, match="truncated"):
        make_sample(settings(), materials, 0, length=96, depth=0.5, number=0)
