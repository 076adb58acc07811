"""Containment finds text inside other text wherever it stands, and nothing where there is nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.containment import CHUNK, Containment


def words(seed: int, count: int) -> bytes:
    rng = np.random.default_rng(seed)
    return b" ".join(b"w%d" % number for number in rng.integers(0, 5000, size=count))


@settings(max_examples=20, deadline=None)
@given(before=st.integers(0, 3000), after=st.integers(0, 3000))
def test_planted_text_is_found_at_every_depth(before: int, after: int) -> None:
    planted = words(1, 1000)
    checker = Containment([planted, words(2, 1000)])
    checker.see(words(3, before) + b"\n" + planted.upper() + b" . " + words(4, after))
    shares = checker.shares()
    assert shares[0] == 1.0
    assert shares[1] == 0.0


def test_share_is_the_part_that_is_contained() -> None:
    text = words(1, 8000)
    checker = Containment([text])
    checker.see(text[: len(text) // 4])
    assert checker.shares()[0] == pytest.approx(0.25, abs=0.05)


def test_long_text_is_found_across_chunks() -> None:
    text = words(1, CHUNK // 3)
    checker = Containment([text[len(text) // 2 :]])
    checker.see(text)
    assert checker.shares()[0] > 0.98


@pytest.mark.parametrize("count", range(1, 30))
def test_short_texts_are_found_whole(count: int) -> None:
    text = words(count, count)
    checker = Containment([text, words(99, count)])
    checker.see(words(3, 50) + b"\n" + text + b"\n" + words(4, 50))
    assert checker.shares() == [1.0, 0.0]


def test_repetitive_text_is_found() -> None:
    checker = Containment([b"pass\n" * 500])
    checker.see(words(1, 50) + b" pass" * 40)
    assert checker.shares() == [1.0]


def test_scripts_without_spaces_are_told_apart_by_letters() -> None:
    rng = np.random.default_rng(0)
    one, other = ("".join(map(chr, rng.integers(0x4E00, 0x9000, size=400))) for _ in range(2))
    checker = Containment([one.encode(), other.encode()])
    checker.see((other[:7] + one[100:]).encode())
    assert checker.shares() == [pytest.approx(0.75, abs=0.01), 0.0]


def test_text_without_words_cannot_be_told_and_counts_as_contained() -> None:
    checker = Containment([b"", b"... !"])
    checker.see(b"some words")
    assert checker.shares() == [1.0, 1.0]
    assert Containment([]).shares() == []
