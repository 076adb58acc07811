"""Tokenizers: text comes back, bytes are counted, and two engines that share nothing give the same ids."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import (
    END_OF_TEXT,
    BpeSettings,
    BpeTokenizer,
    ByteSettings,
    ByteTokenizer,
    build_tokenizer,
    train_bpe,
)
from settings import Refusal

LIBRARY = Path(sysconfig.get_path("stdlib"))
ODD = "naïve café — 漢字 🙂🙂\u200d\u2028 \t\t\n\n\n  x\r\n don't I'LL 1234567 \u0301\x00 ﬁ " + END_OF_TEXT + " end  "


def local_texts() -> list[str]:
    names = ["argparse.py", "json/decoder.py", "html/entities.py", "pydoc_data/topics.py", "encodings/punycode.py"]
    return [(LIBRARY / name).read_text(encoding="utf-8")[:120_000] for name in names if (LIBRARY / name).exists()]


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bpe") / "code.json"
    train_bpe([*local_texts()[:3], ODD], 1500, file)
    return file


@pytest.fixture(scope="module")
def bpe(bpe_file: Path) -> BpeTokenizer:
    return BpeTokenizer(bpe_file)


def test_engines_agree(bpe_file: Path) -> None:
    """tiktoken encodes what `tokenizers` trained: the same ids on real files and on odd text."""
    theirs = tokenizers.Tokenizer.from_file(str(bpe_file))
    theirs.encode_special_tokens = True
    ours = BpeTokenizer(bpe_file)
    for text in [*local_texts(), ODD]:
        assert ours.encode(text) == theirs.encode(text).ids
    assert theirs.get_vocab_size() == ours.vocab_size == 1500
    assert theirs.token_to_id(END_OF_TEXT) == ours.end_of_text == 1499


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_text_comes_back_and_bytes_are_counted(bpe: BpeTokenizer, text: str) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_bytes(text.encode()).tolist() == ids
        assert tokenizer.end_of_text not in ids
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.num_bytes(np.array([*ids, tokenizer.end_of_text, -100], dtype=np.int64)) == len(text.encode())
        assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text


def test_broken_utf8_decodes_to_replacement_characters(bpe_file: Path) -> None:
    tokenizer = BpeTokenizer(bpe_file)
    first_of_two = tokenizer.encode_bytes("é".encode())[:1] if len(tokenizer.encode("é")) > 1 else []
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    assert tokenizer.decode(first_of_two) in ("\ufffd", "")


def test_fingerprint_follows_the_merges(bpe_file: Path, tmp_path: Path) -> None:
    again = train_bpe([*local_texts()[:3], ODD], 1500, tmp_path / "same.json")
    assert again.fingerprint == BpeTokenizer(bpe_file).fingerprint
    other = train_bpe([*local_texts()[:3], ODD], 1400, tmp_path / "other.json")
    assert len({again.fingerprint, other.fingerprint, ByteTokenizer().fingerprint}) == 3


def test_settings_choose(bpe_file: Path) -> None:
    assert isinstance(build_tokenizer(ByteSettings()), ByteTokenizer)
    assert build_tokenizer(BpeSettings(file=str(bpe_file))).vocab_size == 1500


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path, bpe_file: Path) -> None:
    with pytest.raises(Refusal, match=r"nope\.json: no such tokenizer; make it with"):
        BpeTokenizer(tmp_path / "nope.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(Refusal, match=r"bad\.json: not a byte-level BPE tokenizer"):
        BpeTokenizer(tmp_path / "bad.json")
    table = json.loads(bpe_file.read_text())
    table["added_tokens"] = []
    (tmp_path / "open.json").write_text(json.dumps(table))
    with pytest.raises(Refusal, match="has no token"):
        BpeTokenizer(tmp_path / "open.json")
    with pytest.raises(Refusal, match="vocab_size=100 must be at least 258"):
        train_bpe(["x"], 100, tmp_path / "small.json")
