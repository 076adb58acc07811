"""Containment finds text inside other text wherever it stands, and nothing where there is nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.containment import CHUNK, Containment, shingles


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


def test_one_run_in_sixteen_is_kept() -> None:
    assert len(shingles(words(5, 20_000))) == pytest.approx(20_000 / 16, rel=0.15)


def test_short_and_empty_texts_have_nothing_to_find() -> None:
    checker = Containment([b"", b"too few words"])
    checker.see(b"too few words")
    assert checker.shares() == [0.0, 0.0]
    assert Containment([]).shares() == []
