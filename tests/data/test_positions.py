"""PoSE: positions below the reach, rising, without a skip inside a chunk, and every distance possible."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import Batches
from data.demand import Demand
from data.order import counted
from data.positions import Consecutive, Pose, chunks_of
from parallel.mesh import SequenceSettings
from parallel.rows import split_batch
from settings import Refusal
from tests.data.texts import fill, settings_of

LENGTH = 128


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    folder: Path = fill(tmp_path_factory.mktemp("positions"))
    return Batches(settings_of(folder), seed=7)


def keys(count: int, seed: int = 1) -> np.ndarray:
    return counted(seed, np.arange(count)).view(np.int64)


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=1, max_size=4),
    reach=st.integers(50, 500),
    chunks=st.integers(2, 4),
    seed=st.integers(0, 99),
)
def test_positions_rise_from_0_below_the_reach_with_few_skips(
    rows: list[list[int]], reach: int, chunks: int, seed: int
) -> None:
    lengths, counts = np.array([n for row in rows for n in row]), np.array([len(row) for row in rows])
    drawn = chunks_of(Pose(reach=reach, chunks=chunks), lengths, counts, keys(len(rows), seed))
    for length, ours in zip(lengths, np.split(drawn.positions(lengths), np.cumsum(lengths)[:-1]), strict=True):
        assert len(ours) == length and ours[0] == 0 and ours[-1] < reach
        steps = np.diff(ours)
        assert (steps >= 1).all() and (steps > 1).sum() < chunks


def test_skips_and_borders_are_uniform_and_every_distance_occurs() -> None:
    """Of one stretch of 6 tokens that reaches 12: 5 borders and 7 skips, each as likely as the other."""
    count, length, reach = 35_000, np.array([6]), 12
    lengths = np.repeat(length, count)
    positions = chunks_of(Pose(reach=reach), lengths, np.ones(count, dtype=int), keys(count)).positions(lengths)
    positions_SN = positions.reshape(count, 6)
    skip_S = positions_SN[:, -1] - 5
    assert np.bincount(skip_S, minlength=7) == pytest.approx(np.full(7, count / 7), rel=0.06)
    border_S = (np.diff(positions_SN, axis=1) > 1).argmax(axis=1)[skip_S > 0]
    assert np.bincount(border_S, minlength=5) == pytest.approx(np.full(5, len(border_S) / 5), rel=0.06)
    distances = {int(row[j] - row[i]) for row in positions_SN[:2000] for i in range(6) for j in range(i, 6)}
    assert distances == set(range(reach))


def test_documents_of_a_row_and_rows_draw_apart() -> None:
    lengths, counts = np.full(40, 50), np.full(4, 10)
    drawn = chunks_of(Pose(reach=10_000), lengths, counts, keys(4))
    assert len(np.unique(drawn.skips_DX[:, 1])) > 35
    again = chunks_of(Pose(reach=10_000), lengths[:20], counts[:2], keys(4)[:2])
    assert np.array_equal(again.skips_DX, drawn.skips_DX[:20])


def test_a_reach_of_the_length_skips_nothing() -> None:
    lengths = np.array([64, 64])
    drawn = chunks_of(Pose(reach=64), lengths, np.array([2]), keys(1))
    plain = chunks_of(Consecutive(), lengths, np.array([2]), keys(1))
    assert np.array_equal(drawn.positions(lengths), plain.positions(lengths))
    assert np.array_equal(plain.positions(lengths), np.tile(np.arange(64), 2))


def test_only_positions_change(batches: Batches) -> None:
    """Needles, tokens, labels, borders and places are those of the plain demand; the same at any world size."""
    for first in (0, 1000):
        plain = batches.take(Demand(1, LENGTH), first, 16, 4)
        posed = batches.take(Demand(1, LENGTH, positions=Pose(reach=512)), first, 16, 4)
        for ours, theirs in zip(posed, plain, strict=True):
            for name in ("tokens_BT", "labels_BT", "weights_BT", "places_BT", "keys_B", "sources_B"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))
            assert ours.lengths == theirs.lengths and ours.mask_lengths == theirs.mask_lengths
            assert not torch.equal(ours.positions_BT, theirs.positions_BT) and int(ours.positions_BT.max()) < 512
            starts = np.cumsum([0, *ours.lengths[:-1]])
            assert (ours.positions_BT.flatten()[starts] == 0).all()
        shares = [batches.take(Demand(1, LENGTH, positions=Pose(reach=512)), first, 16, 4, r, 2) for r in range(2)]
        for number, batch in enumerate(posed):
            assert torch.equal(shares[number % 2][number // 2].positions_BT, batch.positions_BT)


def test_needles_are_met_over_the_whole_reach(batches: Batches) -> None:
    """In rows of 128 the answer lies up to 512 positions behind its needle."""
    demand = Demand(0, LENGTH, {"needles": 1.0}, positions=Pose(reach=512))
    spans = [int(batch.positions_BT.max()) for batch in batches.take(demand, 0, 60, 1)]
    assert max(spans) > 480 and min(spans) < 300


def test_parts_of_rows_keep_their_positions(batches: Batches) -> None:
    (batch,) = batches.take(Demand(1, LENGTH, positions=Pose(reach=512)), 0, 4, 4)
    for layout in ("zigzag", "balanced"):
        parts = [split_batch(batch, SequenceSettings(layout=layout), 2, rank) for rank in range(2)]
        together = parts[0].layout.unshard([part.positions_BT for part in parts])
        assert torch.equal(together, batch.positions_BT)
        assert sum(part.num_documents for part in parts) == batch.num_documents


def test_a_reach_below_the_length_is_refused(batches: Batches) -> None:
    with pytest.raises(Refusal, match=r"positions\.reach=100 is below sequence_length=128"):
        batches.check(Demand(0, LENGTH, positions=Pose(reach=100)))
    batches.check(Demand(0, LENGTH, positions=Pose(reach=128)))


def test_without_a_document_mask_a_row_is_one_stretch(batches: Batches) -> None:
    whole = {"has_document_mask": False}
    (plain,) = batches.take(Demand(1, LENGTH, **whole), 0, 8, 8)
    assert torch.equal(plain.positions_BT, plain.places_BT)
    (posed,) = batches.take(Demand(1, LENGTH, **whole, positions=Pose(reach=512)), 0, 8, 8)
    steps = posed.positions_BT.diff(dim=1)
    assert (steps >= 1).all() and ((steps > 1).sum(dim=1) <= 1).all() and (posed.positions_BT[:, 0] == 0).all()
