"""Many needles: each form asks for what it says, at exact lengths, and values are counted one by one."""

import re
from bisect import bisect_left

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from evals import many_needles
from evals.many_needles import ManyNeedlesSettings, make_sample
from settings import Refusal


def settings(**changes) -> ManyNeedlesSettings:
    return ManyNeedlesSettings(**{"lengths": (150, 240), "haystack": "web", "samples": 4, **changes})


class Reader(nn.Module):
    """Knows the format: answers the n-th question for a key with its n-th value, but forgets every `forgets`-th one."""

    def __init__(self, forgets: int | None = None) -> None:
        super().__init__()
        self.forgets = forgets
        self.head_weight = nn.Parameter(torch.eye(257))

    def forward(self, tokens_BT, positions_BT=None, mask=None):
        hidden_BTD = torch.zeros(*tokens_BT.shape, 257)
        for row, tokens in enumerate(tokens_BT.tolist()):
            text = bytes(min(token, 255) for token in tokens).decode("latin-1")
            needles = re.findall(r"\[([A-Z]+)=(\d+)\]", text)
            asked: list[str] = []
            for number, question in enumerate(re.finditer(r"\?([A-Z]+)=", text), start=1):
                asked.append(question[1])
                values = [value for key, value in needles if key == question[1]]
                value = values[asked.count(question[1]) - 1]
                if self.forgets is None or number % self.forgets:
                    for digit, place in enumerate(range(question.end() - 1, question.end() + len(value) - 1)):
                        if place < len(tokens):
                            hidden_BTD[row, place, ord(value[digit])] = 30.0
        return hidden_BTD, ()


@pytest.mark.parametrize("form", ["multi_key", "multi_query", "multi_value"])
@pytest.mark.parametrize("needles", [2, 5])
def test_each_form_asks_for_what_it_says(form: str, needles: int, materials) -> None:
    orders, keys_seen = set(), set()
    for number in range(8):
        sample = make_sample(settings(needles=needles), materials, 0, form=form, length=240, number=number)
        text = materials.tokenizer.decode(sample.tokens)
        hidden = re.findall(r" \[([A-Z]{2})=(\d{4})\] ", text)
        asked = re.findall(r"\?([A-Z]{2})=(\d{4})\n", text)
        assert len(sample.tokens) == 240 and len(hidden) == needles
        assert text.endswith("".join(f"?{key}={value}\n" for key, value in asked))
        assert [materials.tokenizer.decode(sample.tokens[at : at + 4]) for at in sample.starts_M] == [
            v for _, v in asked
        ]
        assert set(asked) <= set(hidden)
        keys = {key for key, _ in hidden}
        if form == "multi_value":
            assert len(keys) == 1 and asked == hidden
        else:
            assert len(keys) == needles and len(set(asked)) == (1 if form == "multi_key" else needles)
        orders.add(tuple(hidden.index(one) for one in asked))
        keys_seen |= keys
    assert len(orders) > 1 or form == "multi_value"
    assert len(keys_seen) > 4


@pytest.mark.parametrize(("forgets", "score"), [(None, 1.0), (1, 0.0), (2, 0.5), (4, 0.75)])
def test_values_are_counted_one_by_one(forgets: int | None, score: float, materials) -> None:
    cells = many_needles.run(Reader(forgets), settings(), materials, seed=0)
    forms = ["multi_key", "multi_query", "multi_value"]
    assert [(cell.task, cell.length) for cell in cells] == [
        (f"many_needles/{form}", length) for length in (150, 240) for form in forms
    ]
    for cell in cells:
        expected = float(forgets != 1) if cell.task.endswith("multi_key") else score
        assert (cell.score, cell.count, cell.extra["needles"]) == (expected, 4, 4)
        assert cell.extra["exact"] == float(expected == 1) and cell.extra["token_accuracy"] == pytest.approx(expected)
        assert cell.extra["low"] <= cell.score <= cell.extra["high"]
        if expected == 1:
            assert cell.extra["answer_logprob"] == pytest.approx(0, abs=1e-6)


def test_one_wrong_digit_loses_the_value(materials) -> None:
    class Slips(Reader):
        """Is wrong about the last digit of every sample."""

        def forward(self, tokens_BT, positions_BT=None, mask=None):
            hidden_BTD, stats = super().forward(tokens_BT, positions_BT, mask)
            hidden_BTD[:, -3] = 0
            return hidden_BTD, stats

    for cell in many_needles.run(Slips(), settings(lengths=(150,)), materials, seed=0):
        values = 1 if cell.task.endswith("multi_key") else 4
        assert (cell.score, cell.extra["exact"]) == (1 - 1 / values, 0)
        assert cell.extra["token_accuracy"] == 1 - 1 / (4 * values)


def test_a_sample_is_a_function_of_its_place_alone(materials) -> None:
    def tokens(seed=0, form="multi_query", length=150, number=1, **changes) -> list[int]:
        return make_sample(
            settings(**changes), materials, seed, form=form, length=length, number=number
        ).tokens.tolist()

    assert tokens() == tokens(samples=50, lengths=(333,), forms=("multi_key",))
    assert all(tokens() != tokens(**other) for other in ({"seed": 1}, {"form": "multi_value"}, {"number": 2}))
    assert tokens()[:60] != tokens(length=160)[:60]


def test_what_does_not_fit_is_refused(materials) -> None:
    many_needles.check(settings(), materials)
    for form, least in (("multi_key", 54), ("multi_query", 81), ("multi_value", 81)):
        short = rf"evals.many_needles.lengths={least - 1} does not fit: .*use {least} or more"
        with pytest.raises(Refusal, match=short):
            many_needles.check(settings(lengths=(least - 1, 240), forms=(form,)), materials)
        many_needles.check(settings(lengths=(least,), forms=(form,)), materials)
        make_sample(settings(), materials, 0, form=form, length=least, number=0)
        with pytest.raises(Refusal, match="no room"):
            make_sample(settings(), materials, 0, form=form, length=least - 1, number=0)
    sizes = range(200, 50_000)
    whole = sizes[bisect_left(sizes, True, key=lambda length: not fits(length, ("multi_key",), materials))] - 1
    several = ("multi_query", "multi_key")
    assert fits(whole + 1, several[:1], materials) and fits(whole, several, materials)
    assert not fits(whole + 1, several, materials), "whichever form stands first"
    with pytest.raises(Refusal, match=r"evals.many_needles: needles=25 need different keys"):
        many_needles.check(settings(needles=25, key_letters=1), materials)
    with pytest.raises(Refusal, match=r"lengths=99999 does not fit: .* use a longer text"):
        many_needles.check(settings(lengths=(150, 99_999)), materials)
    with pytest.raises(Refusal, match=r"evals.many_needles.haystack='wbe'"):
        many_needles.check(settings(haystack="wbe"), materials)
    for wrong in ({"needles": 1}, {"forms": ()}, {"forms": ("multi",)}, {"lengths": (150, 150)}):
        with pytest.raises(ValidationError):
            settings(**wrong)


def fits(length: int, forms, materials) -> bool:
    try:
        many_needles.check(settings(lengths=(length,), forms=forms), materials)
    except Refusal:
        return False
    return True


def test_only_values_are_asked(materials, monkeypatch) -> None:
    seen = []
    true = many_needles.score_rows
    monkeypatch.setattr(many_needles, "score_rows", lambda *args: seen.append(args[2]) or true(*args))
    many_needles.run(Reader(), settings(lengths=(150,), forms=("multi_query",)), materials, seed=0)
    [rows] = seen
    for tokens_T, labels_T in zip(rows.tokens_BT, rows.labels_BT, strict=True):
        asked = np.flatnonzero(labels_T != -100)
        assert len(asked) == 16 and labels_T[asked].tolist() == tokens_T[asked + 1].tolist()
        assert re.fullmatch(r"\d{16}", bytes(labels_T[asked].tolist()).decode())
