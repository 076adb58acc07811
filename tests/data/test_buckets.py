"""Buckets: shares of a source's tokens by the length of documents, exact to a row; refusals that name what lacks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.batches import Batch, Batches, DataSettings
from data.buckets import Bucket, Buckets, bands_of
from data.demand import Demand
from data.mixture import Blend
from data.tokenizer import ByteTokenizer
from settings import Refusal, Section, validate

LENGTH = 64
SHORT, MIDDLE, LONG = 30, 200, 900
"""Bytes of documents; the token that ends one comes on top."""
ALPHABETS = {"s": "abcdefghij", "m": "klmnopqrst", "l": "ABCDEFGHIJ"}
"""What documents of each length are written in, so that a row says what it was made of."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty documents of each length in each source, no two alike."""
    folder = tmp_path_factory.mktemp("buckets")
    for name in ("books", "web"):
        (folder / name).mkdir()
        for number in range(60):
            kind, length = (("s", SHORT), ("m", MIDDLE), ("l", LONG))[number % 3]
            digits = f"{number + 100 * len(name):0{length}d}"
            (folder / name / f"{number}.txt").write_text("".join(ALPHABETS[kind][int(digit)] for digit in digits))
    return folder


def settings_of(folder: Path, **more: object) -> DataSettings:
    text = {"kind": "text", "held_out": 0.0}
    sources = {
        "books": {"path": str(folder / "books"), "weight": 0.6, **text},
        "web": {"path": str(folder / "web"), "weight": 0.4, **text},
        "needles": {"kind": "recall", "haystack": "books", "weight": 0.0},
    }
    return validate({"sources": sources, "prepared": str(folder / "prepared"), **more}, DataSettings, "test")


@pytest.fixture(scope="module")
def batches(folder: Path) -> Batches:
    return Batches(settings_of(folder), seed=3)


def demand(buckets: dict[str, list[tuple[int, float]]], **more: Any) -> Demand:
    named = {name: tuple(Bucket(from_tokens=n, share=share) for n, share in these) for name, these in buckets.items()}
    return Demand(0, LENGTH, buckets=named, **more)


def kind_of(row: np.ndarray) -> str:
    """Which documents a row is made of."""
    (kind,) = {kind for kind, alphabet in ALPHABETS.items() if np.isin(row, [ord(letter) for letter in alphabet]).any()}
    return kind


def counts(taken: list[Batch]) -> dict[tuple[int, str], int]:
    """Rows of books by what they are made of, and of the others, which have no buckets."""
    found: dict[tuple[int, str], int] = {}
    for batch in taken:
        for source, row in zip(batch.sources_B.tolist(), batch.tokens_BT.numpy(), strict=True):
            key = (source, kind_of(row) if source == 0 else "all")
            found[key] = found.get(key, 0) + 1
    return found


def test_shares_are_exact_to_a_row_and_the_source_keeps_its_own(batches: Batches) -> None:
    """A row is of one bucket alone; each bucket has its share of its source's rows at every moment of the stage."""
    wanted = demand({"books": [(100, 0.3), (500, 0.5)]})
    for stop in (10, 37, 400):
        found = counts(batches.take(wanted, 0, stop, 1))
        of_books = {"s": 0.2, "m": 0.3, "l": 0.5}
        for kind, share in of_books.items():
            assert abs(found.get((0, kind), 0) - stop * 0.6 * share) <= 1.5
        assert abs(found[1, "all"] - stop * 0.4) <= 1


def test_a_source_that_is_not_named_gives_the_rows_it_gave(batches: Batches) -> None:
    """Its rows are keyed by itself: buckets of another source change which samples are its own, not what they are."""
    web = {"web": 1.0}
    plain = batches.take(Demand(0, LENGTH, web), 0, 20, 20)[0]
    beside = batches.take(demand({"books": [(500, 1.0)]}, mixture=web), 0, 20, 20)[0]
    assert (plain.tokens_BT == beside.tokens_BT).all()


def test_only_long_documents_and_all_of_them(batches: Batches) -> None:
    """Share 1 leaves the shorter out; an epoch of the bucket has every token of its documents once."""
    only = demand({"books": [(500, 1.0)]}, mixture={"books": 1.0}, pack="concat")
    num_rows = 20 * (LONG + 1) // LENGTH + 1
    (taken,) = batches.take(only, 0, num_rows, num_rows)
    assert counts([taken]) == {(0, "l"): num_rows}
    tokens = taken.tokens_BT.numpy()[taken.is_real_BT.numpy()]
    assert (tokens != ByteTokenizer.end_of_text).sum() == 20 * LONG
    assert (taken.labels_BT == ByteTokenizer.end_of_text).sum() == 20


@given(
    shares=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    rest=st.integers(0, 9),
    begins=st.sets(st.integers(2, 1000), min_size=4, max_size=4),
)
def test_bands_part_all_documents(shares: list[int], rest: int, begins: set[int]) -> None:
    """Every length lies in one band at most, and in one exactly where all have a share; shares sum to 1."""
    total = sum(shares) + rest
    buckets = [Bucket(from_tokens=n, share=s / total) for n, s in zip(sorted(begins), shares, strict=False)]
    bands = bands_of(buckets)
    assert sum(band.share for band in bands) == pytest.approx(1)
    assert all(band.share > 0 for band in bands)
    lengths = np.arange(1, 1100)
    found = sum((band.holds(lengths).astype(int) for band in bands), start=np.zeros(len(lengths), dtype=int))
    assert found.max() == 1
    for length, count in zip(lengths.tolist(), found.tolist(), strict=True):
        share = next((bucket.share for bucket in reversed(buckets) if length >= bucket.from_tokens), rest / total)
        assert count == (share > 0)


@pytest.mark.parametrize(
    ("buckets", "match"),
    [
        ([(500, 0.5), (100, 0.5)], r"from_tokens=\[500, 100\] must rise"),
        ([(100, 0.5), (100, 0.5)], r"from_tokens=\[100, 100\] must rise"),
        ([(100, 0.7), (500, 0.7)], r"shares sum to 1\.4; .*at most 1 together"),
        ([(100, 0.0)], r"shares sum to 0; .*above 0"),
        ([(1, 0.7)], r"shares sum to 0\.7, but no document is shorter than from_tokens=1"),
        ([], "names no length"),
    ],
)
def test_buckets_that_make_no_sense(batches: Batches, buckets: list[tuple[int, float]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bands_of([Bucket(from_tokens=n, share=share) for n, share in buckets])
    with pytest.raises(Refusal, match=r"buckets\.books: .*" + match):
        batches.check(demand({"books": buckets}))


@pytest.mark.parametrize(
    ("buckets", "match"),
    [
        ({"bokks": [(100, 1.0)]}, r"buckets names 'bokks', which is not in data\.sources; did you mean 'books'\?"),
        ({"needles": [(100, 1.0)]}, r"buckets\.needles: this source makes its samples"),
        (
            {"books": [(5000, 0.5)]},
            r"data\.sources\.books: has no document of 5,000 tokens or more for its bucket, the longest has 901",
        ),
        ({"books": [(300, 0.5), (500, 0.5)]}, r"books: has no document of 300 to 499 tokens"),
        ({"books": [(10, 0.5)]}, r"books: has no document of 1 to 9 tokens"),
        (
            {"books": [(901, 0.5)]},
            None,
        ),
    ],
)
def test_what_a_source_does_not_have(batches: Batches, buckets: dict[str, Any], match: str | None) -> None:
    if match is None:
        batches.check(demand(buckets))
        return
    with pytest.raises(Refusal, match=match):
        batches.check(demand(buckets))


def test_too_few_long_documents_for_one_row(batches: Batches) -> None:
    huge = Demand(0, 30_000, {"books": 1.0}, buckets={"books": (Bucket(from_tokens=500, share=1.0),)})
    with pytest.raises(Refusal, match=r"has 18020 tokens for training in its 20 documents of 500 tokens or more, less"):
        batches.check(huge)
    batches.check(Demand(0, 20_000, {"books": 1.0}))


def test_a_bucket_of_a_source_that_is_not_drawn_from_may_be_empty(batches: Batches) -> None:
    batches.check(demand({"books": [(5000, 1.0)]}, mixture={"web": 1.0}))


def test_buckets_are_pure_and_the_same_at_any_world_size(folder: Path, batches: Batches) -> None:
    wanted = demand({"books": [(100, 0.3), (500, 0.5)], "web": [(500, 0.9)]})
    whole = batches.take(wanted, 7, 24, 2)
    for ranks in (2, 3):
        shares = [Batches(settings_of(folder), seed=3).take(wanted, 7, 24, 2, rank, ranks) for rank in range(ranks)]
        for number, batch in enumerate(whole):
            other = shares[number % ranks][number // ranks]
            assert (batch.tokens_BT == other.tokens_BT).all() and (batch.keys_B == other.keys_B).all()


def test_one_bucket_over_all_documents_shuffles_anew_but_keeps_shares(batches: Batches) -> None:
    """Blended bands of equal weight are blended as sources of these weights are."""
    wanted = demand({"books": [(100, 0.25), (500, 0.25)]}, mixture={"books": 1.0})
    order = "".join(kind_of(row) for row in batches.take(wanted, 0, 40, 40)[0].tokens_BT.numpy())
    blend, _ = Blend((0.5, 0.25, 0.25)).take(0, 40)
    assert order == "".join("sml"[which] for which in blend)


def test_documents_are_as_long_on_average_as_buckets_draw_them(batches: Batches) -> None:
    """Half the tokens from documents of 201 and half from those of 901: about nine of 201 to two of 901."""
    plain = batches.mean_document_lengths(demand({}))
    assert plain["books"] == pytest.approx(np.mean([SHORT, MIDDLE, LONG]) + 1)
    half = batches.mean_document_lengths(demand({"books": [(100, 0.5), (500, 0.5)]}, mixture={"web": 1.0}))
    assert half["books"] == pytest.approx(2 / (1 / (MIDDLE + 1) + 1 / (LONG + 1)))
    assert half["web"] == plain["web"]
    assert batches.mean_document_lengths(demand({"books": [(5000, 1.0)]}))["books"] == 0


def test_a_configuration_with_senseless_buckets_is_refused_by_its_key() -> None:
    class Stage(Section):
        buckets: Buckets

    validate({"buckets": {"books": [{"from_tokens": 9, "share": 0.5}]}}, Stage, "test")
    with pytest.raises(Refusal, match=r"test: buckets\.books=\[.*\]: the shares sum to 1\.5"):
        validate(
            {"buckets": {"books": [{"from_tokens": 9, "share": 0.5}, {"from_tokens": 10, "share": 1.0}]}}, Stage, "test"
        )
    with pytest.raises(Refusal, match=r"buckets\.books\.0\.share=1\.5"):
        validate({"buckets": {"books": [{"from_tokens": 9, "share": 1.5}]}}, Stage, "test")
