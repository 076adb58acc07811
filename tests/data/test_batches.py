"""Batches: pure, the same at any world size, labels inside documents only, and refusals that name what is wrong."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import Batch, Batches, DataSettings
from data.corpus import text_documents
from data.demand import Demand
from data.order import derive
from data.packing import PACKINGS, Pack
from data.prepare import prepare
from data.prepared import Prepared
from data.tokenizer import ByteTokenizer
from settings import Refusal, validate

END = ByteTokenizer.end_of_text
LENGTH = 128


def table(folder: Path, **more: object) -> dict[str, object]:
    sources = {
        "prose": {"kind": "text", "path": str(folder / "prose"), "weight": 0.3, "held_out": 0.1},
        "code": {"kind": "text", "path": str(folder / "code"), "weight": 0.2, "held_out": 0.1},
        "needles": {"kind": "recall", "haystack": "prose", "weight": 0.5, "answer_weight": 5.0},
    }
    return {"sources": sources, "prepared": str(folder / "prepared"), **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, mean in (("prose", 300), ("code", 60)):
        (folder / name).mkdir()
        for number in range(60):
            # Every document is its own, so that each row's pieces can be found again.
            body = " ".join(f"{name}{number}.{word}" for word in range(1 + int(rng.exponential(mean)) // 8))
            (folder / name / f"{number}.txt").write_text(body)
    return folder


def settings_of(folder: Path, **more: object) -> DataSettings:
    return validate(table(folder, **more), DataSettings, "test")


@pytest.fixture(scope="module")
def batches(folder: Path) -> Batches:
    return Batches(settings_of(folder), seed=1)


def prepared_of(folder: Path, name: str) -> Prepared:
    paths = (folder / "prepared").glob("text-*/manifest.json")
    return next(Prepared(path.parent, ByteTokenizer()) for path in paths if name in path.read_text())


def same(ours: Batch, theirs: Batch) -> bool:
    tensors = ("tokens_BT", "labels_BT", "weights_BT", "positions_BT", "sources_B")
    return ours.lengths == theirs.lengths and all(
        torch.equal(getattr(ours, name), getattr(theirs, name)) for name in tensors
    )


def rows_of(taken: list[Batch]) -> list[tuple[bytes, ...]]:
    return [
        tuple(
            getattr(batch, name)[row].numpy().tobytes()
            for name in ("tokens_BT", "labels_BT", "weights_BT", "positions_BT")
        )
        for batch in taken
        for row in range(len(batch.tokens_BT))
    ]


def test_shapes_and_dtypes(batches: Batches) -> None:
    taken = batches.take(Demand(0, LENGTH), 0, 24, 8)
    assert len(taken) == 3
    for batch in taken:
        for tensor in (batch.tokens_BT, batch.labels_BT, batch.positions_BT):
            assert tensor.shape == (8, LENGTH)
            assert tensor.dtype == torch.int64
        assert batch.weights_BT.dtype == torch.float32
        assert batch.num_tokens == 8 * LENGTH
        assert batch.num_targets == int((batch.labels_BT != -100).sum())
        assert batch.sources_B.shape == (8,)
        assert 0 <= int(batch.tokens_BT.min()) <= int(batch.tokens_BT.max()) < batches.tokenizer.vocab_size


def test_documents_fill_rows_and_positions_start_anew(batches: Batches) -> None:
    for batch in batches.take(Demand(0, LENGTH), 0, 64, 16):
        ends = np.cumsum(batch.lengths)
        assert set(range(LENGTH, 16 * LENGTH + 1, LENGTH)) <= set(ends.tolist())
        expected = np.concatenate([np.arange(length) for length in batch.lengths])
        assert np.array_equal(batch.positions_BT.numpy().ravel(), expected)


@pytest.mark.parametrize("pack", ["best_fit", "concat"])
def test_labels_stay_inside_documents(folder: Path, pack: str) -> None:
    """Each piece's labels are its tokens moved by one; the last is the document's next token, or none at its end."""
    batches = Batches(settings_of(folder, pack=pack), seed=1)
    following: dict[bytes, set[int]] = {}
    for name in ("prose", "code"):
        prepared = prepared_of(folder, name)
        for number in range(prepared.train.num_documents):
            document = prepared.train.document(number).astype(np.int64)
            for place in range(8, len(document)):
                following.setdefault(document[place - 8 : place].tobytes(), set()).add(int(document[place]))
            following.setdefault(document[-8:].tobytes(), set()).add(-100)
    pieces_seen = borders = 0
    for batch in batches.take(Demand(0, LENGTH, {"prose": 1, "code": 1}), 0, 256, 64):
        tokens, labels = batch.tokens_BT.numpy().ravel(), batch.labels_BT.numpy().ravel()
        assert np.array_equal(batch.weights_BT.numpy().ravel(), (labels != -100).astype(np.float32))
        place = 0
        for length in batch.lengths:
            piece, targets = tokens[place : place + length], labels[place : place + length]
            place += length
            if (piece == END).all() and length > 1:
                assert (targets == -100).all()  # padding
                continue
            assert np.array_equal(targets[:-1], piece[1:])
            if piece[-1] == END:
                assert targets[-1] == -100
                borders += 1
            elif length >= 8:
                assert targets[-1] != -100
                assert int(targets[-1]) in following[piece[-8:].tobytes()]
            assert END not in piece[:-1]
            pieces_seen += 1
    assert pieces_seen > 100
    assert borders > 50


@pytest.mark.parametrize("pack", ["best_fit", "concat"])
def test_an_epoch_has_every_token_once_and_the_next_has_another_order(folder: Path, pack: Pack) -> None:
    batches = Batches(settings_of(folder, pack=pack), seed=1)
    prepared = prepared_of(folder, "prose")
    key = derive("packing", prepared.fingerprint, 64)
    num_rows = PACKINGS[pack](prepared.train.lengths, 64, key).num_rows

    def epoch(number: int) -> list[Batch]:
        return batches.take(Demand(2, 64, {"prose": 1}), number * num_rows, num_rows, 1)

    first, second = rows_of(epoch(0)), rows_of(epoch(1))
    assert sorted(first) == sorted(second)
    assert first != second
    tokens = np.concatenate([batch.tokens_BT.numpy().ravel() for batch in epoch(0)])
    labels = np.concatenate([batch.labels_BT.numpy().ravel() for batch in epoch(0)])
    train = prepared.train.tokens
    assert np.array_equal(np.bincount(tokens, minlength=257)[:256], np.bincount(train, minlength=257)[:256])
    # Each token but a document's first is a target once.
    assert (labels != -100).sum() == len(train) - prepared.train.num_documents


@pytest.mark.parametrize("pack", ["best_fit", "concat"])
def test_every_row_has_a_target(tmp_path: Path, pack: str) -> None:
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / f"text/{number}.txt").write_text(chr(97 + number) * 32 * (number + 1))
    sources = {"x": {"kind": "text", "path": str(tmp_path / "text"), "held_out": 0.0}}
    table = {"sources": sources, "prepared": str(tmp_path / "prepared"), "pack": pack}
    (batch,) = Batches(validate(table, DataSettings, "test"), seed=1).take(Demand(0, 32), 0, 80, 80)
    assert (batch.labels_BT != -100).any(dim=1).all()


@settings(max_examples=30, deadline=None)
@given(
    first=st.integers(0, 5000),
    splits=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    sequence_length=st.sampled_from([96, 128, 300]),
    stage=st.integers(0, 3),
)
def test_any_split_of_a_range_gives_the_same_rows(
    batches: Batches, first: int, splits: list[int], sequence_length: int, stage: int
) -> None:
    mixture = {"prose": 0.5, "needles": 0.5}
    whole = rows_of(batches.take(Demand(stage, sequence_length, mixture), first, sum(splits), 1))
    parts: dict[int, list[tuple[bytes, ...]]] = {}
    starts = [first + sum(splits[:number]) for number in range(len(splits))]
    for start, count in reversed(list(zip(starts, splits, strict=True))):
        parts[start] = rows_of(batches.take(Demand(stage, sequence_length, mixture), start, count, count))
    assert [row for start in starts for row in parts[start]] == whole


@pytest.mark.parametrize("world_size", [2, 4])
def test_world_size_changes_nothing(folder: Path, batches: Batches, world_size: int) -> None:
    alone = batches.take(Demand(0, LENGTH), 40, 16, 2)
    shares = [
        Batches(settings_of(folder), seed=1, rank=rank, world_size=world_size).take(Demand(0, LENGTH), 40, 16, 2)
        for rank in range(world_size)
    ]
    assert all(len(share) == 8 // world_size for share in shares)
    together = [shares[number % world_size][number // world_size] for number in range(8)]
    assert all(same(ours, theirs) for ours, theirs in zip(together, alone, strict=True))


def test_seed_stage_and_length_change_the_order(folder: Path, batches: Batches) -> None:
    def tokens(of: Batches, stage: int) -> bytes:
        return of.take(Demand(stage, LENGTH), 0, 8, 8)[0].tokens_BT.numpy().tobytes()

    other = Batches(settings_of(folder), seed=2)
    again = Batches(settings_of(folder), seed=1)
    assert tokens(batches, 0) == tokens(again, 0)
    assert len({tokens(batches, 0), tokens(batches, 1), tokens(other, 0)}) == 3


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [({}, (0.3, 0.2, 0.5)), ({"code": 3.0, "prose": 1.0}, (0.25, 0.75, 0.0)), ({"needles": 1.0}, (0.0, 0.0, 1.0))],
)
def test_sources_come_in_their_shares(
    batches: Batches, mixture: Mapping[str, float], expected: tuple[float, ...]
) -> None:
    taken = batches.take(Demand(0, LENGTH, mixture), 0, 400, 100)
    counts = np.bincount(torch.cat([batch.sources_B for batch in taken]).numpy(), minlength=3)
    assert np.abs(counts / 400 - np.array(expected)).max() <= 1 / 400
    for batch in taken:
        is_recall = batch.sources_B == batches.names.index("needles")
        has_answer = (batch.weights_BT == 5.0).any(dim=1)
        assert torch.equal(is_recall, has_answer)


def test_held_out_text_is_never_trained_on(batches: Batches) -> None:
    held_out = batches.all_held_out()
    assert set(held_out) == {"prose", "code"}
    text = ByteTokenizer().decode(held_out["prose"])
    names = {word.split(".")[0] for word in text.replace("prose", " prose").split()}
    assert names
    seen = set()
    for batch in batches.take(Demand(0, 64, {"prose": 1.0}), 0, 400, 400):
        for row in batch.tokens_BT.numpy():
            seen |= {word.split(".")[0] for word in ByteTokenizer().decode(row).split() if word.count(".") == 1}
    assert len(seen) > 20
    assert not {name for name in names if name in seen and len(name) > 5}


def test_fingerprint_names_what_the_samples_rest_on(folder: Path, batches: Batches) -> None:
    fingerprint = batches.fingerprint
    assert set(fingerprint) == {"tokenizer", "pack", "sources.prose", "sources.code", "sources.needles"}
    assert Batches(settings_of(folder), seed=9, rank=1, world_size=2).fingerprint == fingerprint
    assert Batches(settings_of(folder, pack="concat"), seed=1).fingerprint != fingerprint


def test_shards_source_equals_text_source(folder: Path, tmp_path: Path, batches: Batches) -> None:
    prepare(text_documents(folder / "prose"), ByteTokenizer(), tmp_path / "out", 0.1)
    sources = {"prose": {"kind": "shards", "path": str(tmp_path / "out")}}
    shards = Batches(validate({"sources": sources}, DataSettings, "test"), seed=1)
    (ours,), (theirs,) = (of.take(Demand(0, LENGTH, {"prose": 1}), 0, 8, 8) for of in (shards, batches))
    assert torch.equal(ours.tokens_BT, theirs.tokens_BT)


def test_to_moves_every_tensor(batches: Batches) -> None:
    (batch,) = batches.take(Demand(0, LENGTH), 0, 4, 4)
    moved = batch.to("meta")
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.lengths == batch.lengths
    assert same(batch.to("cpu"), batch)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((Demand(0, LENGTH, {"poetry": 1.0}), 0, 4, 4), r"mixture names 'poetry', which is not in data\.sources"),
        ((Demand(0, LENGTH, {"prose": 0.0}), 0, 4, 4), "at least one positive"),
        ((Demand(0, LENGTH), 0, 6, 4), "6 samples of 128 tokens must divide into world_size=1 x 4 rows"),
        (
            (Demand(0, 10**6, {"code": 1.0}), 0, 4, 4),
            r"data\.sources\.code: has \d+ tokens for training, less than one",
        ),
        ((Demand(0, 64, {"needles": 1.0}), 0, 4, 4), r"data\.sources\.needles: fractions=.*give samples of 16 tokens"),
    ],
)
def test_impossible_requests_are_refused(batches: Batches, arguments: tuple[object, ...], match: str) -> None:
    with pytest.raises(Refusal, match=match):
        batches.take(*arguments)  # type: ignore[arg-type]


def test_impossible_settings_are_refused(folder: Path, tmp_path: Path, batches: Batches) -> None:
    with pytest.raises(
        Refusal, match=r"sources\.n\.haystack='prosa' must name a source of text; did you mean 'prose'\?"
    ):
        sources = {"n": {"kind": "recall", "haystack": "prosa"}, "prose": {"kind": "local_python"}}
        validate({"sources": sources}, DataSettings, "test")
    with pytest.raises(Refusal, match=r"sources: '\$x' is no name; take letters, digits"):
        validate({"sources": {"$x": {"kind": "local_python"}}}, DataSettings, "test")
    with pytest.raises(Refusal, match="every weight is 0"):
        validate({"sources": {"code": {"kind": "local_python", "weight": 0.0}}}, DataSettings, "test")
    for source, match in (
        ({"kind": "text", "path": str(tmp_path / "none.txt")}, r"data\.sources\.x: .*none\.txt: no such file"),
        ({"kind": "shards", "path": str(tmp_path)}, r"data\.sources\.x: .*holds no manifest\.json"),
    ):
        with pytest.raises(Refusal, match=match):
            Batches(validate({"sources": {"x": source}, "prepared": str(tmp_path)}, DataSettings, "test"), seed=0)
    with pytest.raises(Refusal, match="'needles' is not a source with held-out text"):
        batches.held_out("needles")
    (tmp_path / "file").write_text("x")
    source = {"kind": "text", "path": str(folder / "prose")}
    with pytest.raises(Refusal, match=r"data\.sources\.x: .*file: no prepared folder can be made there"):
        Batches(validate({"sources": {"x": source}, "prepared": str(tmp_path / "file")}, DataSettings, "test"), seed=0)
    source = {"kind": "shards", "path": str(tmp_path / "file")}
    with pytest.raises(Refusal, match=r"data\.sources\.x: .*file: is a file, not a prepared folder"):
        Batches(validate({"sources": {"x": source}}, DataSettings, "test"), seed=0)
