"""Needle samples: exact length, the answer where it is said to be, the needle at its depth, the haystack untouched."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.recall import LETTERS, Haystack, NeedleMaker, RecallSettings, RecallSource, needle_grid, needle_sample
from data.rows import NO_TARGET
from data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from settings import Refusal

TEXT = "".join(f"line {number} of a text that has no brackets and no question;\n" for number in range(400))
BYTES = ByteTokenizer()
NEEDLE = re.compile(r" \[([A-Z]+)=(\d+)\] ")
QUESTION = re.compile(r"\?([A-Z]+)=(\d+)\n$")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe([TEXT, "[AB=12] ?AB=12\n" * 50], 400, tmp_path_factory.mktemp("bpe") / "t.json")


def haystack_of(tokenizer: Tokenizer) -> np.ndarray:
    return tokenizer.encode_bytes(TEXT.encode())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(80, 1500),
    depth=st.none() | st.floats(0, 1),
    needles=st.integers(1, 4),
    letters=st.integers(1, 4),
    digits=st.integers(1, 6),
)
def test_sample_is_what_it_says(  # noqa: PLR0917
    seed: int, length: int, depth: float | None, needles: int, letters: int, digits: int
) -> None:
    sample = needle_sample(
        np.random.default_rng(seed), BYTES, haystack_of(BYTES), length, depth, needles, letters, digits
    )
    text = BYTES.decode(sample.tokens)
    assert sample.tokens.shape == (length,)
    assert sample.tokens.dtype == np.int64
    question = QUESTION.search(text)
    assert question
    key, value = question.groups()
    assert (len(key), len(value)) == (letters, digits)
    assert BYTES.decode(sample.tokens[sample.answer]) == value
    hidden = dict(NEEDLE.findall(text))
    assert len(hidden) == needles
    assert hidden[key] == value
    haystack = NEEDLE.sub("", text[: question.start()])
    assert haystack in TEXT
    room = len(haystack)
    before = len(NEEDLE.sub("", text[: text.index(f" [{key}={value}] ")]))
    assert before == round(sample.depth * room)
    if depth is not None:
        assert before == int(depth * room)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(200, 1500),
    depths=st.lists(st.floats(0, 1), min_size=1, max_size=6, unique=True),
)
def test_a_grid_is_one_haystack_asked_for_every_needle(seed: int, length: int, depths: list[float]) -> None:
    samples = needle_grid(np.random.default_rng(seed), BYTES, haystack_of(BYTES), length, depths)
    texts = [BYTES.decode(sample.tokens) for sample in samples]
    questions = [QUESTION.search(text) for text in texts]
    assert len(samples) == len(depths) and all(len(sample.tokens) == length for sample in samples)
    assert len({text[: question.start()] for text, question in zip(texts, questions, strict=True)}) == 1
    haystack_and_needles = texts[0][: questions[0].start()]
    hidden = dict(NEEDLE.findall(haystack_and_needles))
    assert {question[1] for question in questions} == hidden.keys() and len(hidden) == len(depths)
    assert NEEDLE.sub("", haystack_and_needles) in TEXT
    room = len(NEEDLE.sub("", haystack_and_needles))
    for sample, question, depth in zip(samples, questions, depths, strict=True):
        assert BYTES.decode(sample.tokens[sample.answer]) == question[2] == hidden[question[1]]
        before = len(NEEDLE.sub("", haystack_and_needles.partition(f" [{question[1]}={question[2]}] ")[0]))
        assert before == int(depth * room) == round(sample.depth * room)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_sample_with_merged_tokens(bpe: Tokenizer, depth: float) -> None:
    sample = needle_sample(np.random.default_rng(1), bpe, haystack_of(bpe), 200, depth)
    text = bpe.decode(sample.tokens)
    question = QUESTION.search(text)
    assert len(sample.tokens) == 200
    assert question
    assert f" [{question[1]}={question[2]}] " in text
    assert bpe.decode(sample.tokens[sample.answer]) == question[2]
    assert sample.depth == pytest.approx(depth, abs=0.01)


def test_same_generator_same_sample_other_generator_other_sample() -> None:
    one, same, other = (
        needle_sample(np.random.default_rng(seed), BYTES, haystack_of(BYTES), 100).tokens for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_keys_values_and_depths_are_spread_evenly() -> None:
    maker = NeedleMaker(BYTES, 1, 2, 4)
    keys = np.arange(4000, dtype=np.uint64) * np.uint64(7)
    lengths = np.full(4000, 120)
    haystack = Haystack.parted(haystack_of(BYTES), BYTES.end_of_text)
    tokens, starts, depths = maker.make(keys, haystack, lengths, None)
    rows = tokens.reshape(4000, 120)
    assert depths.mean() == pytest.approx(0.5, abs=0.02)
    first_letter = rows[:, 120 - maker.question_length + 1]
    assert set(first_letter.tolist()) == {ord(letter) for letter in LETTERS}
    digits = rows[np.arange(4000)[:, None], starts[:, None] + np.arange(4)]
    assert np.abs(np.bincount(digits.ravel() - ord("0"), minlength=10) / 16_000 - 0.1).max() < 0.01
    assert len({bytes(row.astype(np.uint8)) for row in digits}) > 3000


@pytest.mark.parametrize(
    ("length", "needles", "match"),
    [
        (20, 1, "a sample of 20 tokens has no room for needles=1 of 11 tokens and a question of 9; the shortest .* 21"),
        (10**6, 1, "needs 999980 tokens of haystack, but the haystack has"),
        (10_000, 25, "needles=25 need different keys, but key_letters=1 gives only 24"),
    ],
)
def test_what_does_not_fit_is_refused(length: int, needles: int, match: str) -> None:
    letters = 2 if needles == 1 else 1
    with pytest.raises(Refusal, match=match):
        needle_sample(np.random.default_rng(0), BYTES, haystack_of(BYTES), length, None, needles, letters)


def source(haystack: np.ndarray | None = None, **chosen: object) -> RecallSource:
    parted = Haystack.parted(haystack_of(BYTES) if haystack is None else haystack, BYTES.end_of_text)
    return RecallSource("n", RecallSettings(haystack="t", **chosen), BYTES, parted, "below")  # type: ignore[arg-type]


def documents_of(*lengths: int) -> np.ndarray:
    """Documents of these many tokens and an end each; document d is letters chr(97 + d)."""
    return np.concatenate([[97 + number] * length + [BYTES.end_of_text] for number, length in enumerate(lengths)])


def test_windows_lie_inside_one_document_where_one_is_long_enough() -> None:
    haystack = documents_of(30, 150, 3, 110, 0, 108, 40)
    room, draws = 108, 20_000
    starts = Haystack.parted(haystack, BYTES.end_of_text).starts(
        np.arange(draws, dtype=np.uint64), np.full(draws, room)
    )
    windows, counts = np.unique(starts, return_counts=True)
    inside = [start for start in range(len(haystack) - room + 1) if len(set(haystack[start : start + room])) == 1]
    inside = [start for start in inside if haystack[start] != BYTES.end_of_text]
    assert windows.tolist() == inside
    assert np.abs(counts / draws * len(inside) - 1).max() < 0.25  # each window as likely as another


def test_windows_of_mixed_lengths_at_once() -> None:
    haystack = documents_of(30, 150, 3, 110, 0, 108, 40)
    rng = np.random.default_rng(0)
    keys, rooms = rng.integers(1 << 63, size=3000).astype(np.uint64), rng.integers(1, 300, size=3000)
    parted = Haystack.parted(haystack, BYTES.end_of_text)
    starts = parted.starts(keys, rooms)
    assert np.array_equal(starts[5:6], parted.starts(keys[5:6], rooms[5:6]))
    for start, room in zip(starts.tolist(), rooms.tolist(), strict=True):
        assert 0 <= start <= len(haystack) - room
        assert (room <= 150) == (BYTES.end_of_text not in haystack[start : start + room])


def test_text_after_the_last_end_is_a_document() -> None:
    sample = needle_sample(np.random.default_rng(0), BYTES, documents_of(20, 20, 100)[:-1], 100)
    assert BYTES.end_of_text not in sample.tokens


@pytest.mark.parametrize("lengths", [(500, 300), (9,) * 60])
def test_no_label_crosses_a_border_of_documents(lengths: tuple[int, ...]) -> None:
    rows = source(documents_of(*lengths), answer_weight=3.0).rows(np.arange(50), 128, 7)
    is_end = rows.tokens_RT == BYTES.end_of_text
    assert is_end.any() == (len(lengths) > 2)
    assert (rows.labels_RT[is_end] == NO_TARGET).all()
    assert np.array_equal(rows.weights_RT == 0, rows.labels_RT == NO_TARGET)
    assert (rows.labels_RT != NO_TARGET).any(axis=1).all()


@pytest.mark.parametrize("sequence_length", [128, 200, 512])
@pytest.mark.parametrize("needles", [1, 2])
def test_rows_are_full_of_samples(sequence_length: int, needles: int) -> None:
    fractions = (0.375, 0.75, 1.0) if needles == 2 else (0.25, 0.3, 0.375, 0.75, 1.0)
    rows = source(needles=needles, fractions=fractions, answer_weight=7.0).rows(np.arange(40), sequence_length, 99)
    assert rows.tokens_RT.shape == (40, sequence_length)
    assert rows.counts_R.sum() == len(rows.document_lengths)
    place = 0
    tokens, labels, weights = rows.tokens_RT.ravel(), rows.labels_RT.ravel(), rows.weights_RT.ravel()
    for length in rows.document_lengths.tolist():
        sample = slice(place, place + length)
        text = BYTES.decode(tokens[sample])
        assert QUESTION.search(text)
        assert len(NEEDLE.findall(text)) == needles
        assert labels[sample].tolist() == [*tokens[sample][1:].tolist(), NO_TARGET]
        weighty = np.flatnonzero(weights[sample] == 7.0)
        assert BYTES.decode(labels[sample][weighty]) == QUESTION.search(text)[2]  # type: ignore[index]
        assert weights[sample][-1] == 0
        assert set(weights[sample].tolist()) == {0.0, 1.0, 7.0}
        place += length
    ends = np.cumsum(rows.document_lengths)
    assert set(range(sequence_length, 40 * sequence_length + 1, sequence_length)) <= set(ends.tolist())
    if sequence_length == 128 and needles == 1:
        assert {32, 48, 128} <= set(rows.document_lengths.tolist())


def test_a_row_is_a_function_of_its_number_and_key() -> None:
    numbers = np.array([5, 1000, 3])
    together = source().rows(numbers, 128, 99)
    for place, number in enumerate(numbers):
        alone = source().rows(np.array([number]), 128, 99)
        assert np.array_equal(alone.tokens_RT[0], together.tokens_RT[place])
    assert not np.array_equal(source().rows(numbers, 128, 98).tokens_RT, together.tokens_RT)


def test_lengths_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(
        Refusal, match=r"data\.sources\.n: fractions=\[0\.25\] of sequence_length=64 give samples of 16"
    ):
        source(fractions=(0.25,)).check(64)
    with pytest.raises(Refusal, match=r"sequence_length=1000000 is longer than its haystack 't'"):
        source().check(1_000_000)
    with pytest.raises(ValueError, match="each fraction is a share"):
        RecallSettings(haystack="t", fractions=(0.5, 1.5))


def test_fingerprint_covers_format_and_haystack_but_not_weight() -> None:
    same = {source().fingerprint, source(weight=3.0).fingerprint}
    assert len(same) == 1
    assert not same & {source(value_digits=5).fingerprint, source(needles=2).fingerprint}


def test_haystack_tokens_may_be_memory_mapped(tmp_path: Path) -> None:
    haystack_of(BYTES).tofile(tmp_path / "h")
    mapped = np.memmap(tmp_path / "h", dtype=np.uint16, mode="r")
    plain = needle_sample(np.random.default_rng(1), BYTES, haystack_of(BYTES), 100)
    assert np.array_equal(needle_sample(np.random.default_rng(1), BYTES, mapped, 100).tokens, plain.tokens)
