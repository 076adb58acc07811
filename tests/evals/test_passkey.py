"""The passkey: exact lengths, whole words, and a key that stands where it was put."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from data.tokenizer import ByteSettings, build_tokenizer, train_bpe
from evals import passkey
from evals.passkey import FILLER, PasskeySettings, make_question
from settings import Refusal


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    file: Path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    texts = [passkey.TASK, passkey.QUESTION, passkey.KEY, FILLER, "0 1 2 3 4 5 6 7 8 9 12 34 56 78 90 " * 5]
    return {"byte": build_tokenizer(ByteSettings()), "bpe": train_bpe(texts, 400, file)}


def test_the_prompt_is_as_written(tokenizers) -> None:
    question = make_question(tokenizers["byte"], 400, 0.25, key=54321)
    assert bytes(question.prompt.tolist()).decode() == (
        "\n\n\n\n\n\n\n"
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.\n"
        "The grass is green. The sky is blue.\n"
        "The pass key is 54321. Remember it. 54321 is the pass key.\n"
        "The sun is yellow. Here we go. There and back again. The grass is green. The sky is blue. The sun is\n"
        "What is the pass key? The pass key is"
    )
    assert bytes(question.answer.tolist()) == b" 54321" and question.references == ("54321",)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["byte", "bpe"]),
    length=st.integers(270, 1400),
    depth=st.floats(0, 1),
    key=st.integers(10_000, 99_999),
)
def test_exact_tokens_of_whole_words_around_the_key(tokenizers, name, length, depth, key) -> None:
    tokenizer = tokenizers[name]
    question = make_question(tokenizer, length, depth, key)
    assert question.size == length
    text = tokenizer.decode(question.prompt)
    padding = len(text) - len(text.lstrip("\n"))
    task, before, line, after, asked = text[padding:].split("\n")
    words = [*before.split(), *after.split()]
    assert words == (FILLER.split() * (len(words) // 19 + 1))[: len(words)], "filler goes on where it was interrupted"
    assert len(before.split()) == round(depth * len(words))
    assert padding <= len(" yellow.") + 1, "another word would have fitted"
    assert (task, asked) == (passkey.TASK, passkey.QUESTION) and line.count(str(key)) == 2


class Finder:
    """A stand-in for questions: what was written, and the key."""

    def __init__(self, text: str, key: str) -> None:
        self.texts = [text]
        self.questions = [type("Asked", (), {"references": (key,)})]


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        (" 54321.", True),
        ("54321 12345", True),
        ("12345 54321", False),
        (" 543210", False),
        (" a key", False),
        ("", False),
    ],
)
def test_the_first_number_is_what_counts(text: str, is_right: bool) -> None:
    assert passkey.is_found(Finder(text, "54321")) == [is_right]


def test_keys_have_five_digits_and_their_own_draw() -> None:
    keys = [passkey.draw_key(seed, 320, 0.5, number) for seed in range(3) for number in range(300)]
    assert len(set(keys)) > 890 and {len(str(key)) for key in keys} == {5}
    assert passkey.draw_key(0, 320, 0.5, 1) == keys[1] != passkey.draw_key(0, 321, 0.5, 1)
    assert keys[1] != passkey.draw_key(0, 320, 0.25, 1)


class KeyReader(nn.Module):
    """Says the last key told within `reach` tokens before the question, digit by digit, then a full stop."""

    def __init__(self, reach: int = 10_000) -> None:
        super().__init__()
        self.reach = reach
        self.head_weight = nn.Parameter(torch.eye(257))

    def forward(self, tokens_BT, positions_BT=None, mask=None):
        hidden_BTD = torch.zeros(*tokens_BT.shape, 257)
        for row, tokens in enumerate(tokens_BT.tolist()):
            text = bytes(tokens).decode()
            after = text.rindex(passkey.QUESTION) + len(passkey.QUESTION)
            told = re.search(r"is (\d{5})\.", text[max(0, after - self.reach) : after])
            for place, said in enumerate(f" {told[1]}." if told else ""):
                if after - 1 + place < len(tokens):
                    hidden_BTD[row, after - 1 + place, ord(said)] = 30.0
        return hidden_BTD, ()


def test_a_cell_for_each_length_and_depth(materials) -> None:
    asked = PasskeySettings(lengths=(320, 400), depths=(0.0, 1.0), samples=3, generate=True)
    cells = passkey.run(KeyReader(), asked, materials, seed=0)
    assert [(cell.length, cell.depth) for cell in cells] == [(320, 0), (320, 1), (400, 0), (400, 1)]
    for cell in cells:
        assert cell.task == "passkey" and cell.count == 3
        assert cell.score == cell.extra["generated"] == 1 and cell.extra["low"] > 0.3
    far = passkey.run(KeyReader(reach=130), asked, materials, seed=0)
    assert [cell.score for cell in far] == [0, 1, 0, 1]
    led = passkey.run(KeyReader(), asked.model_copy(update={"generate": False}), materials, seed=0)
    assert [cell.score for cell in led] == [1] * 4 and "generated" not in led[0].extra


def test_what_does_not_fit_is_refused(materials) -> None:
    shortest = len(passkey.TASK) + len(passkey.KEY.format(key=10_000)) + len(passkey.QUESTION) + 4
    with pytest.raises(
        Refusal, match=rf"evals.passkey.lengths=200 .* take {shortest} tokens .* use {shortest + 10} or"
    ):
        passkey.check(PasskeySettings(lengths=(400, 200)), materials)
    assert make_question(materials.tokenizer, shortest + 10, 0.0, 12345).size == shortest + 10
    for wrong in ({"depths": (1.5,)}, {"depths": ()}, {"lengths": (320, 320)}, {"samples": 0}):
        with pytest.raises(ValidationError):
            PasskeySettings(**{"lengths": (320,), **wrong})


def test_the_answers_tokens_are_the_keys(tokenizers) -> None:
    for tokenizer in tokenizers.values():
        answer = make_question(tokenizer, 400, 0.5, 98765).answer
        assert tokenizer.decode(np.asarray(answer)) == " 98765"


def test_room_is_counted_for_the_key_of_most_tokens(materials, tmp_path) -> None:
    """A tokenizer may know some keys as one token."""
    texts = [passkey.TASK, passkey.QUESTION, passkey.KEY, FILLER, "10000 " * 50]
    tokenizer = train_bpe(texts, 400, tmp_path / "tokenizer.json")
    easy, hard = (len(tokenizer.encode(f" {key}")) for key in (10_000, 54_321))
    assert easy < hard
    least = next(length for length in range(20, 400) if fits(tokenizer, length, 54_321))
    assert fits(tokenizer, least - 1, 10_000)
    asked = replace(materials, tokenizer=tokenizer)
    with pytest.raises(Refusal, match=rf"lengths={least - 1} does not fit: .*; use {least} or more"):
        passkey.check(PasskeySettings(lengths=(least - 1,)), asked)
    passkey.check(PasskeySettings(lengths=(least,)), asked)


def fits(tokenizer, length: int, key: int) -> bool:
    try:
        return make_question(tokenizer, length, 0.0, key).size == length
    except Refusal:
        return False
