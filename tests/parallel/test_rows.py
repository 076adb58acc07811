"""What one rank holds of a micro-batch: together the ranks hold every token once, with all that belongs to it."""

from dataclasses import replace

import pytest
import torch

from attention.mask import Documents, Mask
from context.plan import SplitMask
from data.batches import Batch
from data.rows import NO_TARGET
from parallel.mesh import SequenceSettings
from parallel.rows import SplitBatch, fingerprint, mask_of, split_batch
from run.microbatches import first_rows

LAYOUTS = [
    SequenceSettings(layout="contiguous"),
    SequenceSettings(layout="zigzag"),
    SequenceSettings(layout="balanced", chunks_per_rank=4),
]


def some_batch(row_length: int = 32, num_rows: int = 3) -> Batch:
    """Rows of three documents, whose last one is padding in some; every number tells where it stood."""
    shape = (num_rows, row_length)
    lengths = [length for row in range(num_rows) for length in (5 + row, 13, row_length - 18 - row)]
    numbers_BT = torch.arange(num_rows * row_length).view(shape)
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    places_BT = torch.arange(row_length).repeat(num_rows, 1)
    is_real_BT = (places_BT < 18) | (torch.arange(num_rows)[:, None] == 1)
    labels_BT = (numbers_BT + 1).where(is_real_BT & (numbers_BT % 3 > 0), NO_TARGET)
    return Batch(
        tokens_BT=numbers_BT,
        labels_BT=labels_BT,
        weights_BT=numbers_BT.float() / 7,
        positions_BT=positions_N.view(shape),
        places_BT=places_BT,
        lengths=tuple(lengths),
        sources_B=torch.zeros(num_rows, dtype=torch.int64),
        is_real_BT=is_real_BT,
        padding_B=(~is_real_BT).sum(1),
        rows_B=torch.arange(num_rows),
        keys_B=torch.arange(num_rows) + 100,
        num_targets=int((labels_BT != NO_TARGET).sum()),
        num_tokens=numbers_BT.numel(),
        num_real=int(is_real_BT.sum()),
    )


def parts_of(batch: Batch, settings: SequenceSettings, ranks: int = 4) -> list[SplitBatch]:
    return [split_batch(batch, settings, ranks, rank) for rank in range(ranks)]


@pytest.mark.parametrize("row_length", [32, 37])
@pytest.mark.parametrize("settings", LAYOUTS, ids=lambda settings: settings.layout)
def test_rows_without_a_document_mask_are_seen_whole_and_their_documents_still_counted(
    settings: SequenceSettings, row_length: int
) -> None:
    """Positions that count through the row, or skip, say nothing of where documents begin."""
    batch = some_batch(row_length)
    whole = replace(batch, has_document_mask=False, positions_BT=batch.places_BT * 3)
    assert whole.mask_lengths == (row_length,) * 3 and whole.num_documents == 9
    parts = parts_of(whole, settings)
    extra = parts[0].num_padding
    expected = (row_length, extra) * 3 if extra else (row_length,) * 3
    assert all(part.mask_lengths == expected for part in parts)
    assert mask_of(parts[0]).documents == Documents(expected)
    assert sum(part.num_documents for part in parts) == 9
    assert parts[0].lengths == parts_of(batch, settings)[0].lengths
    assert parts[0].layout == parts_of(replace(batch, lengths=(row_length,) * 3), settings)[0].layout


@pytest.mark.parametrize("row_length", [32, 37])
@pytest.mark.parametrize("settings", LAYOUTS, ids=lambda settings: settings.layout)
def test_every_token_is_on_one_rank_with_all_that_belongs_to_it(settings: SequenceSettings, row_length: int) -> None:
    batch = some_batch(row_length)
    parts = parts_of(batch, settings)
    for name, whole in vars(batch).items():
        if name.endswith("_BT"):
            together = parts[0].layout.unshard([getattr(part, name) for part in parts])
            assert together.dtype == whole.dtype
            assert torch.equal(together[:, :row_length], whole), name
        elif name.endswith("_B"):
            assert all(torch.equal(getattr(part, name), whole) for part in parts), name
    for name in ("num_targets", "num_real", "num_documents"):
        assert sum(getattr(part, name) for part in parts) == getattr(batch, name), name
    assert {part.num_tokens for part in parts} == {parts[0].tokens_BT.numel()}
    assert {part.sequence_length for part in parts} == {row_length}
    assert all(part.lengths == parts[0].lengths and part.layout == parts[0].layout for part in parts)


@pytest.mark.parametrize("settings", LAYOUTS, ids=lambda settings: settings.layout)
def test_rows_that_do_not_divide_end_in_a_document_that_is_no_text(settings: SequenceSettings) -> None:
    batch = some_batch(37)
    parts = parts_of(batch, settings)
    padded = parts[0].layout.row_length
    assert padded == {"contiguous": 40, "zigzag": 40, "balanced": 48}[settings.layout]
    added = {
        name: parts[0].layout.unshard([getattr(part, name) for part in parts])[:, 37:]
        for name in vars(batch)
        if name.endswith("_BT")
    }
    assert not added["is_real_BT"].any() and (added["labels_BT"] == NO_TARGET).all()
    assert not added["weights_BT"].any()
    assert added["positions_BT"].tolist() == [list(range(padded - 37))] * 3
    assert added["places_BT"].tolist() == [list(range(37, padded))] * 3
    by_row = (batch.lengths[3 * row : 3 * row + 3] for row in range(3))
    assert parts[0].lengths == tuple(length for row in by_row for length in (*row, padded - 37))


def test_the_mask_knows_all_documents_and_who_has_which_tokens() -> None:
    batch = some_batch()
    mask = mask_of(batch)
    assert type(mask) is Mask and mask.documents is not None and mask.documents.lengths == batch.lengths
    part = split_batch(batch, LAYOUTS[2], 2, 1)
    split = mask_of(part)
    assert isinstance(split, SplitMask) and split.layout == part.layout
    assert split.documents is not None and split.documents.lengths == batch.lengths


def test_a_layout_for_windows_balances_what_they_see() -> None:
    batch = replace(some_batch(64, 1), lengths=(64,))
    settings = SequenceSettings(layout="balanced", chunks_per_rank=4)
    assert split_batch(batch, settings, 4, 0).layout != split_batch(batch, settings, 4, 0, window=2).layout


@pytest.mark.parametrize("settings", LAYOUTS, ids=lambda settings: settings.layout)
@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_the_first_rows_lie_where_they_lay(settings: SequenceSettings, num_rows: int) -> None:
    batch = some_batch(37)
    fewer = first_rows(batch, num_rows)
    rows = min(num_rows, 3)
    for part in parts_of(batch, settings):
        first = first_rows(part, num_rows)
        assert isinstance(first, SplitBatch)
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(first, name), value[:rows]), name
        assert first.layout.num_rows == rows
        assert first.layout.pieces(1) != () and sum(first.lengths) == first.layout.num_tokens
        for rank in range(4):
            assert torch.equal(first.layout.token_index(rank), part.layout.token_index(rank)[:rows])
        assert (first.num_tokens, first.sequence_length) == (first.tokens_BT.numel(), 37)
        mask_of(first)
    firsts = [first_rows(part, num_rows) for part in parts_of(batch, settings)]
    for name in ("num_targets", "num_real", "num_documents"):
        assert sum(getattr(first, name) for first in firsts) == getattr(fewer, name), name


def test_a_fingerprint_tells_batches_apart() -> None:
    batch = some_batch()
    known = fingerprint([batch])
    assert fingerprint([some_batch()]) == known
    one_more = batch.tokens_BT.clone()
    one_more[2, 31] += 1
    others = [
        [],
        [batch, batch],
        [replace(batch, lengths=(18, *batch.lengths[2:]))],
        [replace(batch, tokens_BT=one_more)],
        [replace(batch, labels_BT=batch.labels_BT - 1)],
        [replace(batch, weights_BT=batch.weights_BT * 2)],
        [replace(batch, keys_B=batch.keys_B + 1)],
    ]
    assert len({known, *map(fingerprint, others)}) == len(others) + 1
