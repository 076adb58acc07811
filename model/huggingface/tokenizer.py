"""Tokenizers beside a model's weights: ours as a tokenizer.json with the same ids, and theirs as settings of ours."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from data.integers import IntegersSettings
from data.published import PublishedSettings, read_file
from data.tokenizer import END_OF_TEXT, AnyTokenizerSettings, ByteSettings, build_tokenizer
from model.huggingface.aspects import Config, given
from model.huggingface.files import naming, read_json
from settings import Refusal, Table

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


def tokenizer_files(settings: AnyTokenizerSettings, length: int) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, with which AutoTokenizer gives the ids that training had.

    One difference stays: there the end of text, written out in a text, is the end of text. Raises Refusal for a
    tokenizer that is not for text.
    """
    if isinstance(settings, IntegersSettings):
        raise Refusal(
            'data.tokenizer.kind="integers" reads no text, so that no tokenizer.json could say the same; what it was'
            " trained on is asked here: python -m evals RUN"
        )
    text = byte_tokenizer() if isinstance(settings, ByteSettings) else Path(settings.file).read_text(encoding="utf-8")
    end_of_text = settings.end_of_text if isinstance(settings, PublishedSettings) else END_OF_TEXT
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_text,
        "pad_token": end_of_text,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    return {FILE: text, CONFIG: json.dumps(config, indent=2) + "\n"}


def byte_tokenizer() -> str:
    """Ids 0 to 255 are bytes and 256 the end of text, as byte-level BPE that never merges."""
    letters = _letters()
    engine = tokenizers.Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(letters)}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([END_OF_TEXT])
    return engine.to_str(pretty=True)


def _letters() -> list[str]:
    """What byte-level BPE writes for each byte (GPT-2): itself where it prints, else the next letter from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tokenizer_of(folder: Path, config: Config) -> tuple[ByteSettings | PublishedSettings, str | None]:
    """Settings for a folder's tokenizer, and the text of the file that they name, if they name one. Raises Refusal."""
    with naming(folder):
        vocab_size = given(config, "vocab_size")
    if not (folder / FILE).is_file():
        raise Refusal(f"{folder}: has no {FILE}; AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one")
    text, _ = read_file(folder / FILE)
    if vocab_size == 257 and text == byte_tokenizer():
        return ByteSettings(), None
    end_of_text = _end_of_text(folder, config, text)
    settings = PublishedSettings(file=str(folder / FILE), end_of_text=end_of_text, vocab_size=vocab_size)
    build_tokenizer(settings)  # refuses here, before anything is written
    return settings, text


def _end_of_text(folder: Path, config: Config, text: str) -> str:
    """The token that ends a text: by its name, or by its id."""
    path = folder / CONFIG
    table: Table = read_json(path) if path.is_file() else {}
    named = table.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    if named is None:
        numbers = config.get("eos_token_id")
        numbers = numbers if isinstance(numbers, list) else [numbers]
        number = next(iter(numbers), None)
        named = None if number is None else tokenizers.Tokenizer.from_str(text).id_to_token(number)
    if not isinstance(named, str):
        raise Refusal(f"{folder}: neither {CONFIG} nor config.json says which token ends a text; set eos_token there")
    return named
