"""Haystacks: sentences, places between them, and needles that lie where they were put."""

import numpy as np
import pytest

from evals.ruler.haystack import DEPTHS, hide_in_essay, hide_in_lines, sentences_of


def test_the_forty_depths_are_rulers() -> None:
    assert list(DEPTHS) == np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist()


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two? Three! Four", ["One.", "Two?", "Three!", "Four"]),
        ('He said "no." Then 3.5 went (away.) Gone', ['He said "no."', "Then 3.5 went (away.)", "Gone"]),
        ("no end at all", ["no end at all"]),
    ],
)
def test_sentences_end_where_a_stop_is_followed_by_a_blank(text: str, sentences: list[str]) -> None:
    assert sentences_of(text.split()) == sentences


def test_text_without_stops_is_cut() -> None:
    words = [f"w{number}" for number in range(85)]
    sentences = sentences_of(words)
    assert [len(sentence.split()) for sentence in sentences] == [40, 40, 5]
    assert " ".join(sentences).split() == words


def test_each_needle_stands_before_a_line_the_first_one_farthest_back(scripted) -> None:
    assert hide_in_lines(scripted(samples=[[1, 3]]), list("abcd"), ["X", "Y"]) == "a\nY\nb\nc\nX\nd"
    assert hide_in_lines(scripted(samples=[[0]]), list("ab"), ["X"]) == "X\na\nb"


def test_needles_stand_in_their_order_between_sentences(scripted) -> None:
    essay = ["One.", "Two.", "Three.", "Four."]
    assert hide_in_essay(scripted(samples=[[20, 0]]), essay, ["X!", "Y!"]) == " X! One. Two. Y! Three. Four."
