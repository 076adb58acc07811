"""A prepared folder whose digests are right and whose content is not: somebody else wrote it, or meant it."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.corpus import text_documents
from data.prepare import prepare
from data.prepared import Prepared, verify
from data.shards import HEAD, FileDigest, digest
from data.tokenizer import ByteTokenizer
from settings import Refusal
from tests.words import write_words


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_words(tmp_path)
    prepare(text_documents(tmp_path / "words.txt"), ByteTokenizer(), tmp_path / "shards", 0.1)
    return tmp_path / "shards"


def sealed(folder: Path, **facts: int) -> None:
    """The manifest as if what is there now had been prepared; facts: of the split for training."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for split, told in manifest["splits"].items():
        found: dict[str, FileDigest] = {kind: digest(folder / f"{split}.{kind}") for kind in told["files"]}
        told["files"] = {kind: {"size": one.size, "sha256": one.sha256} for kind, one in found.items()}
    manifest["splits"]["train"] |= facts
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(Refusal, match=match):
        Prepared(folder, ByteTokenizer())
    with pytest.raises(Refusal, match=match):
        verify(folder)


def test_ids_that_the_vocabulary_lacks_are_refused(folder: Path) -> None:
    tokens = np.fromfile(folder / "train.bin", dtype="<u2")
    tokens[100] = 257
    tokens.tofile(folder / "train.bin")
    refused(folder, r"train\.bin: was changed after")
    sealed(folder)
    refused(folder, r"train\.bin: has id 257 in a vocabulary of 257; remove .*shards and prepare it anew")


def test_documents_of_less_than_nothing_are_refused(folder: Path) -> None:
    index = bytearray((folder / "train.idx").read_bytes())
    index[HEAD.size : HEAD.size + 4] = (-5).to_bytes(4, "little", signed=True)
    (folder / "train.idx").write_bytes(index)
    sealed(folder)
    refused(folder, r"train\.idx: document 0 has -5 tokens")


def test_a_manifest_that_counts_otherwise_is_refused(folder: Path) -> None:
    sealed(folder, documents=7)
    refused(folder, r"train: holds \d+ documents of \d+ tokens, its manifest says 7 of")
