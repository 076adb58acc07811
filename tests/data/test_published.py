"""A published tokenizer.json: its ids, its bytes, and what is refused."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data.published import PublishedSettings, PublishedTokenizer
from data.tokenizer import END_OF_TEXT, BpeTokenizer, build_tokenizer, train_bpe
from settings import Refusal

TEXTS = ["Der Wind, der Wind,\n das himmlische Kind", "naïve  ☃ snow", "", " ", f"a{END_OF_TEXT}b"]


@pytest.fixture
def bpe_file(tmp_path):
    train_bpe(TEXTS * 9, 300, tmp_path / "bpe.json")
    return tmp_path / "bpe.json"


def sentencepiece(path):
    """As Llama 2 has it: spaces as ▁, bytes for what is not known, and a token before every text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    model = models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>")
    engine = tokenizers.Tokenizer(model)
    engine.normalizer = normalizers.Replace(" ", "▁")
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    engine.add_special_tokens(["<unk>", "<s>", "</s>"])
    engine.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    engine.save(str(path))
    return PublishedTokenizer(PublishedSettings(file=str(path), end_of_text="</s>"))


@pytest.mark.parametrize("text", TEXTS)
def test_it_is_our_own_tokenizer_where_the_file_is_ours(bpe_file, text):
    ours = BpeTokenizer(bpe_file)
    theirs = build_tokenizer(PublishedSettings(file=str(bpe_file), end_of_text=END_OF_TEXT))
    ids = ours.encode(text)
    assert theirs.encode(text) == ids == theirs.encode_bytes(text.encode()).tolist()
    assert theirs.end_of_text not in ids, "it never comes from text"
    assert theirs.decode(ids) == text == theirs.decode([*ids, theirs.end_of_text])
    asked = np.array([*ids, -100, theirs.end_of_text])
    assert theirs.num_bytes(asked) == ours.num_bytes(asked) == len(text.encode())
    assert (theirs.vocab_size, theirs.end_of_text) == (ours.vocab_size, ours.end_of_text)


def test_a_sentencepiece_tokenizer_counts_its_bytes(tmp_path):
    tokenizer = sentencepiece(tmp_path / "llama.json")
    text = " ab ☃b a</s><s>"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer._engine.token_to_id("▁ab"), "nothing is put before a text"
    assert not {1, 2} & set(ids) and tokenizer.end_of_text == 2
    assert tokenizer.decode(ids) == text
    assert tokenizer.num_bytes(np.array([*ids, 2])) == len(text.encode())


def test_ids_beyond_the_tokenizers_are_the_models(bpe_file):
    settings = PublishedSettings(file=str(bpe_file), end_of_text=END_OF_TEXT, vocab_size=320)
    padded, plain = PublishedTokenizer(settings), BpeTokenizer(bpe_file)
    assert padded.vocab_size == 320 > plain.vocab_size
    assert padded.num_bytes(np.array([319])) == 0 and padded.decode([319]) == ""
    assert padded.fingerprint != PublishedTokenizer(settings.model_copy(update={"vocab_size": 321})).fingerprint


def test_what_cannot_be_is_refused(bpe_file, tmp_path):
    def refused(match, **changes):
        with pytest.raises(Refusal, match=match):
            PublishedTokenizer(PublishedSettings(**{"file": str(bpe_file), "end_of_text": END_OF_TEXT, **changes}))

    refused("has no token '</s>'; set data.tokenizer.end_of_text", end_of_text="</s>")
    refused("has ids up to [0-9]+, the model 258: it is another's", vocab_size=258)
    refused("no such tokenizer", file=str(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{")
    refused("is no tokenizer of the `tokenizers` package", file=str(tmp_path / "broken.json"))
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    refused("is no tokenizer of the `tokenizers` package", file=str(tmp_path / "other.json"))
    engine = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.decoder = decoders.WordPiece()
    engine.save(str(tmp_path / "bert.json"))
    refused("loses spaces", file=str(tmp_path / "bert.json"), end_of_text="[UNK]")
