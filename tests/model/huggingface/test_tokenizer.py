"""AutoTokenizer reads what is written beside the weights, and gives the ids that training had."""

import json

import numpy as np
import pytest

from data.integers import IntegersSettings
from data.published import PublishedSettings
from data.tokenizer import END_OF_TEXT, BpeSettings, ByteSettings, build_tokenizer, train_bpe
from model.huggingface.tokenizer import byte_tokenizer, tokenizer_files, tokenizer_of
from settings import Refusal

transformers = pytest.importorskip("transformers")

RANDOM = bytes(np.random.default_rng(0).integers(0, 128, 300).tolist()).decode()
TEXTS = ["def f(x):\n    return x  # größer", "☃ \t\r\n  two  spaces ", "it's we'll 123", RANDOM, " ", ""]


def written(settings, folder, length=48):
    for name, text in tokenizer_files(settings, length).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["byte", "bpe", "huggingface"])
def settings(request, tmp_path):
    if request.param == "byte":
        return ByteSettings()
    file = tmp_path / "bpe.json"
    train_bpe(TEXTS * 5, 300, file)
    if request.param == "bpe":
        return BpeSettings(file=str(file))
    return PublishedSettings(file=str(file), end_of_text=END_OF_TEXT, vocab_size=310)


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_ids(settings, text, tmp_path):
    ours, theirs = build_tokenizer(settings), written(settings, tmp_path)
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.end_of_text, None)
    assert theirs.model_max_length == 48
    assert theirs.decode([*ours.encode(text), ours.end_of_text], skip_special_tokens=True) == text


def test_every_byte_has_its_own_number():
    vocabulary = json.loads(byte_tokenizer())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(256))
    ours = build_tokenizer(ByteSettings())
    for byte in range(128):
        assert ours.encode(chr(byte)) == [byte]


def test_ours_is_known_again_and_theirs_is_named(settings, tmp_path):
    written(settings, tmp_path)
    ours = build_tokenizer(settings)
    again, text = tokenizer_of(tmp_path, {"vocab_size": ours.vocab_size})
    assert build_tokenizer(again).encode(RANDOM) == ours.encode(RANDOM)
    assert build_tokenizer(again).end_of_text == ours.end_of_text
    assert (again == ByteSettings()) == (settings == ByteSettings()) == (text is None)
    # One id more than the tokenizer has: padding of the model's, which needs a place.
    padded, _ = tokenizer_of(tmp_path, {"vocab_size": ours.vocab_size + 1})
    assert build_tokenizer(padded).vocab_size == ours.vocab_size + 1


def test_the_end_of_text_is_found_by_name_or_number(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer())
    config = {"vocab_size": 300}
    for eos in (256, [256, 3]):
        assert tokenizer_of(tmp_path, config | {"eos_token_id": eos})[0].end_of_text == END_OF_TEXT
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END_OF_TEXT}}))
    assert tokenizer_of(tmp_path, config | {"eos_token_id": 65})[0].end_of_text == END_OF_TEXT
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(Refusal, match=r"neither tokenizer_config.json nor config.json says which token ends a text"):
        tokenizer_of(tmp_path, config)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"has no tokenizer.json; AutoTokenizer"):
        tokenizer_of(tmp_path, {"vocab_size": 257})
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer())
    with pytest.raises(Refusal, match="has ids up to 256, the model 200"):
        tokenizer_of(tmp_path, {"vocab_size": 200, "eos_token_id": 256})
    for text in ("{", "[]", '{"eos_token": 7}', '{"eos_token": {"content": ["a"]}}'):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(Refusal, match=r"tokenizer_config.json"):
            tokenizer_of(tmp_path, {"vocab_size": 300, "eos_token_id": 256})
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(Refusal, match="says which token ends a text"):
        tokenizer_of(tmp_path, {"vocab_size": 300, "eos_token_id": []})
    (tmp_path / "tokenizer.json").write_text('{"model": 7}')
    with pytest.raises(Refusal, match=r"tokenizer.json: is no tokenizer"):
        tokenizer_of(tmp_path, {"vocab_size": 300, "eos_token_id": 256})
    with pytest.raises(Refusal, match='kind="integers" reads no text'):
        tokenizer_files(IntegersSettings(size=16), 48)
