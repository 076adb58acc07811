"""Whole numbers as tokens: there and back, one spare id for the end, and words that are no number refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.integers import IntegersTokenizer
from data.tokenizer import Tokenizer, TokenizerSettings, build_tokenizer
from settings import Refusal, Section, validate


class Root(Section):
    tokenizer: TokenizerSettings


@given(ids=st.lists(st.integers(0, 15)))
def test_there_and_back(ids: list[int]) -> None:
    tokenizer: Tokenizer = build_tokenizer(
        validate({"tokenizer": {"kind": "integers", "size": 16}}, Root, "test").tokenizer
    )
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids == tokenizer.encode_bytes(text.encode()).tolist()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (17, 16)
    assert tokenizer.decode([*ids, 16]) == text
    assert tokenizer.num_bytes(np.array([*ids, 16, -100])) == len(ids)


@pytest.mark.parametrize("word", ["16", "-1", "x", "1.0", "٣"])
def test_what_is_no_number_of_it(word: str) -> None:
    with pytest.raises(Refusal, match=f"reads numbers below 16 .*, not '{word}'"):
        IntegersTokenizer(16).encode(f"3 {word} 4")


def test_sizes_are_told_apart() -> None:
    assert IntegersTokenizer(16).fingerprint != IntegersTokenizer(17).fingerprint
