"""What a demand can ask for besides a length: rows seen whole, another packing, other lengths inside a stage."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.batches import Batch, Batches
from data.buckets import Bucket
from data.demand import Demand
from data.packing import pieces
from data.positions import Pose
from data.tokenizer import ByteTokenizer
from settings import Refusal
from tests.data.texts import fill, settings_of

END, LENGTH = ByteTokenizer.end_of_text, 128
TEXT = {"prose": 1.0, "code": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("demand"))


@pytest.fixture(scope="module")
def batches(folder: Path) -> Batches:
    return Batches(settings_of(folder), seed=7)


def test_demands_are_keys() -> None:
    """Equal demands have one hash, and each thing asked for makes another demand."""
    long = (Bucket(from_tokens=4, share=1.0),)
    one = Demand(0, 64, {"a": 1.0, "b": 2.0}, {"a": long})
    assert one == Demand(0, 64, {"b": 2.0, "a": 1.0}, {"a": long})
    assert hash(one) == hash(Demand(0, 64, {"b": 2.0, "a": 1.0}, {"a": long}))
    others = [
        Demand(1, 64),
        Demand(0, 65),
        Demand(0, 64, {"a": 1.0}),
        Demand(0, 64, buckets={"a": long}),
        Demand(0, 64, pack="concat"),
        Demand(0, 64, has_document_mask=False),
        Demand(0, 64, positions=Pose(reach=99)),
        Demand(0, 64, stage_length=128),
    ]
    assert len({Demand(0, 64), *others}) == 9 and len({hash(other) for other in others}) == 8


@pytest.mark.parametrize("pack", ["best_fit", "concat"])
def test_rows_seen_whole_predict_what_stands_next(batches: Batches, pack: str) -> None:
    """The only labels that change are those of texts' ends: from none to the token that follows, but never padding."""
    masked, whole = (
        batches.take(Demand(0, LENGTH, TEXT, pack=pack, has_document_mask=mask), 3, 192, 16) for mask in (True, False)
    )
    changed = 0
    for ours, theirs in zip(whole, masked, strict=True):
        assert torch.equal(ours.tokens_BT, theirs.tokens_BT) and torch.equal(ours.is_real_BT, theirs.is_real_BT)
        assert ours.lengths == theirs.lengths and ours.num_documents == theirs.num_documents
        assert ours.mask_lengths == (LENGTH,) * 16 and theirs.mask_lengths == theirs.lengths
        assert torch.equal(ours.positions_BT, ours.places_BT)
        next_BT = ours.tokens_BT.roll(-1, 1)
        is_next_real_BT = ours.is_real_BT.roll(-1, 1) & (ours.places_BT < LENGTH - 1)
        is_end_BT = (ours.tokens_BT == END) & ours.is_real_BT
        expected_BT = torch.where(is_end_BT & is_next_real_BT, next_BT, theirs.labels_BT)
        assert torch.equal(ours.labels_BT, expected_BT)
        assert torch.equal(ours.weights_BT, (ours.labels_BT >= 0).float())
        assert ours.num_targets == int((ours.labels_BT >= 0).sum())
        changed += int((ours.labels_BT != theirs.labels_BT).sum())
    assert changed > 20


def test_samples_say_themselves_what_is_predicted(batches: Batches) -> None:
    """What follows a needle's question is noise, whether it is seen or not."""
    (masked,), (whole,) = (
        batches.take(Demand(0, LENGTH, {"needles": 1.0}, has_document_mask=mask), 0, 16, 16) for mask in (True, False)
    )
    assert torch.equal(whole.labels_BT, masked.labels_BT) and torch.equal(whole.weights_BT, masked.weights_BT)


def test_another_packing_for_a_stage(folder: Path, batches: Batches) -> None:
    packed_so = Batches(settings_of(folder, "concat"), seed=7)
    (ours,) = batches.take(Demand(0, LENGTH, TEXT, pack="concat"), 0, 8, 8)
    (theirs,) = packed_so.take(Demand(0, LENGTH, TEXT), 0, 8, 8)
    (other,) = batches.take(Demand(0, LENGTH, TEXT), 0, 8, 8)
    assert torch.equal(ours.tokens_BT, theirs.tokens_BT) and not torch.equal(ours.tokens_BT, other.tokens_BT)


def test_documents_decomposed_into_powers_of_two() -> None:
    """Over all lengths up to the longest, every token once; each length's pieces are the binary digits of documents."""
    lengths = np.array([1, 2, 3, 11, 16, 37, 64, 100])
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for size in (1, 2, 4, 8, 16):
        packing = pieces(lengths, size, "decompose", is_longest=size == 16)
        assert (np.diff(packing.row_offsets) == 1).all() and packing.padding == 0
        for row in range(packing.num_rows):
            ((document, start, length),) = packing.row(row)
            assert length == size and start % size == 0
            seen[document][start : start + length] += 1
        digits = [int(length) // 16 if size == 16 else int(length) >> (size.bit_length() - 1) & 1 for length in lengths]
        assert np.bincount(packing.documents, minlength=8).tolist() == digits
    assert all((document == 1).all() for document in seen)


def test_decomposed_rows_are_pieces_of_one_document(batches: Batches) -> None:
    """No border and no padding in any row; labels go on where the document does."""
    for length, longest in ((32, 128), (128, None)):
        demand = Demand(0, length, TEXT, pack="decompose", longest_length=longest)
        (taken,) = batches.take(demand, 0, 48, 48)
        assert taken.lengths == (length,) * 48 and taken.num_real == taken.num_tokens
        assert (taken.tokens_BT[:, :-1] != END).all()
        assert torch.equal(taken.labels_BT[:, :-1], taken.tokens_BT[:, 1:])
        assert ((taken.labels_BT[:, -1] < 0) == (taken.tokens_BT[:, -1] == END)).all()


def test_what_longer_pieces_hold_is_not_cut_into_shorter_ones(batches: Batches) -> None:
    """An epoch of a stage's shorter length has only what its longest left over of each document."""
    found = []
    for longest in (None, 128):
        demand = Demand(0, 32, {"code": 1.0}, pack="decompose", longest_length=longest)
        (taken,) = batches.take(demand, 0, 1000, 1000)
        found.append({row.numpy().tobytes() for row in taken.tokens_BT})
    assert found[1] < found[0] and 10 < len(found[1]) < 68 < len(found[0])


def test_decomposition_needs_a_power_of_two_and_documents_that_have_it(batches: Batches) -> None:
    with pytest.raises(Refusal, match=r"sequence_length=96 is none, try 64 or 128"):
        batches.check(Demand(0, 96, TEXT, pack="decompose"))
    with pytest.raises(Refusal, match=r"data\.sources\.code: no document, .* a piece of sequence_length=4096"):
        batches.check(Demand(0, 4096, {"code": 1.0}, pack="decompose"))


def test_lengths_inside_a_stage_share_no_draw(batches: Batches) -> None:
    """Sample 0 of each length is another one: other needles, another row key; the stage's own length is as alone."""

    def take(length: int, stage_length: int | None) -> Batch:
        return batches.take(Demand(0, length, {"needles": 1.0}, stage_length=stage_length), 0, 32, 32)[0]

    own, spelled_out = take(256, None), take(256, 256)
    assert torch.equal(own.tokens_BT, spelled_out.tokens_BT) and torch.equal(own.keys_B, spelled_out.keys_B)
    inside = [take(128, 256), take(160, 256), own]
    keys = torch.cat([batch.keys_B for batch in inside])
    assert len(keys.unique()) == 96
    questions = [{row[-8:-1].numpy().tobytes() for row in batch.tokens_BT} for batch in inside]
    assert not questions[0] & questions[1] and not questions[0] & questions[2] and not questions[1] & questions[2]


def test_ranks_may_be_named_in_the_call(folder: Path, batches: Batches) -> None:
    """As a stage whose groups of ranks are larger than the run's asks."""
    demand = Demand(0, LENGTH)
    for rank in range(2):
        ours = Batches(settings_of(folder), seed=7, rank=3, world_size=4).take(demand, 8, 16, 2, rank, 2)
        theirs = Batches(settings_of(folder), seed=7, rank=rank, world_size=2).take(demand, 8, 16, 2)
        assert all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(Refusal, match="world_size=3"):
        batches.take(demand, 0, 16, 2, 0, 3)


def test_mean_document_lengths(batches: Batches) -> None:
    """Of documents as they are; of samples as rows of this length hold them on average."""
    means = batches.mean_document_lengths(Demand(0, LENGTH))
    (taken,) = batches.take(Demand(0, LENGTH, {"needles": 1.0}), 0, 4000, 4000)
    assert means["needles"] == pytest.approx(np.mean(taken.lengths), rel=0.02)
    (text,) = batches.take(Demand(0, 1 << 14, {"code": 1.0}, pack="concat"), 0, 2, 2)
    num_ends = int(((text.tokens_BT == END) & text.is_real_BT).sum())
    assert means["code"] == pytest.approx(text.num_real / num_ends, rel=0.001)
    assert batches.mean_document_lengths(Demand(0, 512))["prose"] == means["prose"] > 5 * means["code"]
