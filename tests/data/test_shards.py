"""Shards: what is written comes back, megatron-core reads it too, and a changed file is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards import FileDigest, Shard, ShardWriter, bin_of, check_file, idx_of, token_dtype
from settings import Refusal

DOCUMENTS = [np.array([5, 6, 7]), np.array([], dtype=np.int64), np.array([9]), np.arange(200)]


def written(prefix: Path, documents: list[np.ndarray], vocab_size: int = 300) -> dict[str, FileDigest]:
    with ShardWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return writer.digests


@pytest.mark.parametrize("vocab_size", [257, 65_499, 65_500, 200_000])
def test_what_is_written_comes_back(tmp_path: Path, vocab_size: int) -> None:
    documents = [*DOCUMENTS, np.array([vocab_size - 1, 0])]
    written(tmp_path / "train", documents, vocab_size)
    shard = Shard(tmp_path / "train")
    assert shard.tokens.dtype == (np.uint16 if vocab_size < 65_500 else np.int32)
    assert shard.num_documents == len(documents)
    assert shard.num_tokens == sum(map(len, documents))
    for number, document in enumerate(documents):
        assert np.array_equal(shard.document(number), document)
    assert shard.slice(3, 10, 13).tolist() == [10, 11, 12]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 256), max_size=9), max_size=9), st.integers(0, 256))
def test_end_token_closes_each_document(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]], end: int
) -> None:
    prefix = tmp_path_factory.mktemp("shard") / "x"
    with ShardWriter(prefix, 257) as writer:
        for text in texts:
            writer.add(np.array(text, dtype=np.uint16), end)
    shard = Shard(prefix)
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == [[*text, end] for text in texts]


@pytest.mark.parametrize("vocab_size", [257, 100_000])
def test_megatron_reads_our_shards(tmp_path: Path, vocab_size: int) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = [document for document in DOCUMENTS if len(document)] + [np.array([vocab_size - 1])]
    written(tmp_path / "train", documents, vocab_size)
    theirs = indexed.IndexedDataset(str(tmp_path / "train"))
    assert len(theirs) == len(documents)
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    for number, document in enumerate(documents):
        assert np.array_equal(theirs[number], document)
    assert theirs.get(2, offset=3, length=4).tolist() == [3, 4, 5, 6]


def test_digests_are_those_of_the_files(tmp_path: Path) -> None:
    digests = written(tmp_path / "train", DOCUMENTS)
    for kind, path in (("bin", bin_of(tmp_path / "train")), ("idx", idx_of(tmp_path / "train"))):
        check_file(path, digests[kind], read_whole=True)


def test_changed_file_is_refused(tmp_path: Path) -> None:
    digests = written(tmp_path / "train", DOCUMENTS)
    before = Shard(tmp_path / "train").fingerprint
    path = bin_of(tmp_path / "train")
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(Refusal, match=r"train\.bin: was changed after it was prepared"):
        check_file(path, digests["bin"], read_whole=True)
    assert Shard(tmp_path / "train").fingerprint != before
    path.write_bytes(data[:-2])
    with pytest.raises(Refusal, match=r"has 406 bytes, its manifest says 408"):
        check_file(path, digests["bin"], read_whole=False)
    with pytest.raises(Refusal, match=r"has 406 bytes, its index says 408"):
        Shard(tmp_path / "train")
    path.unlink()
    with pytest.raises(Refusal, match=r"train\.bin: is missing"):
        check_file(path, digests["bin"], read_whole=False)


def test_foreign_index_is_refused(tmp_path: Path) -> None:
    idx_of(tmp_path / "train").write_bytes(b"something else, and long enough to hold a head")
    with pytest.raises(Refusal, match="is not an index of token shards"):
        Shard(tmp_path / "train")
    with pytest.raises(Refusal, match="no such index"):
        Shard(tmp_path / "other")


def test_two_bytes_where_ids_fit() -> None:
    assert token_dtype(65_499).itemsize == 2
    assert token_dtype(65_500).itemsize == 4
