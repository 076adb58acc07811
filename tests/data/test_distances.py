"""Counted distances are those of a walk over all pairs, for documents, windows, PoSE, padding and parts of rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import Batch, Batches, DataSettings
from data.demand import Demand
from data.distances import EDGES, count_distances, distances_of
from data.positions import Chunks, Consecutive, Pose, chunks_of
from parallel.mesh import SequenceSettings
from parallel.rows import split_batch
from settings import validate

LENGTH = 128

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=6)


def walked(positions_by_stretch: list[np.ndarray], window: int | None) -> list[int]:
    """Every pair of a token and one at or before it in its stretch, one by one."""
    counts = [0] * (len(EDGES) - 1)
    for positions in positions_by_stretch:
        for query in range(len(positions)):
            for key in range(query + 1):
                if window is None or query - key < window:
                    counts[int(positions[query] - positions[key]).bit_length()] += 1
    return counts


@given(lengths=LENGTHS, window=st.none() | st.integers(1, 50))
def test_documents(lengths: list[int], window: int | None) -> None:
    expected = walked([np.arange(length) for length in lengths], window)
    assert count_distances(lengths, window).tolist() == expected


@settings(deadline=None)
@given(lengths=LENGTHS, window=st.none() | st.integers(1, 50), chunks=st.integers(2, 4), key=st.integers(0, 2**63 - 1))
def test_skipped_positions(lengths: list[int], window: int | None, chunks: int, key: int) -> None:
    lengths_D = np.array(lengths)
    drawn = chunks_of(Pose(reach=300, chunks=chunks), lengths_D, np.array([len(lengths)]), np.array([key]))
    stretches = np.split(drawn.positions(lengths_D), np.cumsum(lengths_D)[:-1])
    assert count_distances(lengths, window, drawn).tolist() == walked(stretches, window)


def test_counts_stay_whole_numbers_at_any_size() -> None:
    """A thousand documents of a million tokens: 5e14 pairs and more, each counted."""
    length = 1 << 20
    counts = count_distances([length] * 1000)
    assert int(counts.sum()) == 1000 * length * (length + 1) // 2
    assert int(counts[20]) == 1000 * sum(length - i for i in range(1 << 19, 1 << 20))
    assert counts[21:].sum() == 0
    far = Chunks(np.array([[0, 1]]), np.array([[0, (1 << 31) - 3]]))
    assert count_distances([2], chunks=far)[31] == 1


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """Texts of which rows of 128 hold two at most, and never without a rest."""
    folder = tmp_path_factory.mktemp("distances")
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"{number} " * (16 + number % 3 * 10))
    source = {"kind": "text", "path": str(folder), "held_out": 0.0}
    table = {"sources": {"texts": source}, "prepared": str(tmp_path_factory.mktemp("prepared"))}
    return Batches(validate(table, DataSettings, "test"), seed=1)


def real_stretches(batch: Batch) -> list[np.ndarray]:
    positions, is_real = batch.positions_BT.numpy().ravel(), batch.is_real_BT.numpy().ravel()
    ends = np.cumsum(batch.mask_lengths)[:-1]
    return [ours[real] for ours, real in zip(np.split(positions, ends), np.split(is_real, ends), strict=True)]


@pytest.mark.parametrize("positions", [Consecutive(), Pose(reach=1000), Pose(reach=500, chunks=3)], ids=str)
@pytest.mark.parametrize("has_document_mask", [True, False])
@pytest.mark.parametrize("window", [None, 50])
def test_batches_count_what_their_real_tokens_reach(
    taken: Batches, positions: Consecutive | Pose, has_document_mask: bool, window: int | None
) -> None:
    """Whole micro-batches and one rank's parts alike, though a part has neither all positions nor all padding."""
    demand = Demand(0, LENGTH, has_document_mask=has_document_mask, positions=positions)
    batches = taken.take(demand, 0, 8, 4)
    assert all((batch.padding_B > 0).any() for batch in batches) and max(batches[0].lengths) < LENGTH
    expected = walked([stretch for batch in batches for stretch in real_stretches(batch)], window)
    assert distances_of(batches, positions, window).tolist() == expected
    for ranks, layout in ((2, "balanced"), (3, "zigzag")):
        parts = [split_batch(batch, SequenceSettings(layout=layout), ranks, 1, window) for batch in batches]
        assert distances_of(parts, positions, window).tolist() == expected
