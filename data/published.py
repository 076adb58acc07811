"""The tokenizer of a published model: a tokenizer.json of the `tokenizers` package, whatever kind it is."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from pydantic import Field

from settings import Refusal, Section

SPACE = "▁"
"""What SentencePiece writes for a space."""
KEEP_SPACES = {"ByteLevel", "Metaspace", "ByteFallback"}
"""Decoders of tokenizers that lose nothing of a text: byte-level BPE and SentencePiece."""


class PublishedSettings(Section):
    """As `python -m model import` writes it beside the weights that it is for."""

    kind: Literal["huggingface"] = "huggingface"
    file: str
    """A tokenizer.json."""
    end_of_text: str
    """The token that closes a document, such as "</s>"."""
    vocab_size: int | None = Field(default=None, gt=0, le=1 << 24)
    """Ids that the model has, where they are more than the tokenizer's: published ones are often padded."""


class PublishedTokenizer:
    """Ids are the file's own; nothing is put before or after a text, and no special token ever comes from text."""

    def __init__(self, settings: PublishedSettings) -> None:
        """Raises Refusal where the file, its end of text or the number of ids cannot be."""
        text, table = read_file(Path(settings.file))
        self._engine = tokenizers.Tokenizer.from_str(text)
        self._engine.encode_special_tokens = True
        end_of_text = self._engine.token_to_id(settings.end_of_text)
        if end_of_text is None:
            raise Refusal(f"{settings.file}: has no token {settings.end_of_text!r}; set data.tokenizer.end_of_text")
        self.end_of_text = end_of_text
        named = self._engine.get_vocab(with_added_tokens=True)
        self.vocab_size = settings.vocab_size or max(named.values()) + 1
        if max(named.values()) >= self.vocab_size:
            raise Refusal(
                f"{settings.file}: has ids up to {max(named.values())}, the model {self.vocab_size}: it is another's"
            )
        if not _types(table.get("decoder")) & KEEP_SPACES:
            raise Refusal(f"{settings.file}: loses spaces; only byte-level BPE and SentencePiece can be read")
        self._bytes_of_id = _bytes_of_ids(table, named, self.vocab_size)
        what = json.dumps([text, settings.end_of_text, self.vocab_size])
        self.fingerprint = hashlib.sha256(what.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._engine.encode(text, add_special_tokens=False).ids

    def encode_bytes(self, text: bytes) -> np.ndarray:
        return np.array(self.encode(text.decode("utf-8")), dtype=np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._engine.decode([int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True)

    def num_bytes(self, ids: np.ndarray) -> int:
        ids = np.asarray(ids)
        return int(self._bytes_of_id[ids[ids >= 0]].sum())


def _bytes_of_ids(table: dict[str, Any], named: dict[str, int], vocab_size: int) -> np.ndarray:
    """Bytes of text that each id stands for; special tokens and ids without a token stand for none."""
    special = {token["id"] for token in table.get("added_tokens", []) if token.get("special")}
    is_byte_level = "ByteLevel" in _types(table.get("decoder"))
    bytes_of_id = np.zeros(vocab_size, dtype=np.int64)
    for token, number in named.items():
        if number not in special:
            bytes_of_id[number] = len(token) if is_byte_level else _length(token)
    return bytes_of_id


def _length(token: str) -> int:
    """Bytes of a SentencePiece token: <0x0A> is one."""
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return 1 if is_byte else len(token.replace(SPACE, " ").encode())


def _types(part: Any) -> set[str]:
    """The types named in a decoder, which may be a sequence of them."""
    if isinstance(part, dict):
        return {part.get("type", "")}.union(*map(_types, part.values()))
    return set().union(*map(_types, part)) if isinstance(part, list) else set()


def read_file(file: Path) -> tuple[str, dict[str, Any]]:
    """The text of a tokenizer.json, and its table; raises Refusal where `tokenizers` would not take it."""
    try:
        text = file.read_text(encoding="utf-8")
        table = json.loads(text)
        tokenizers.Tokenizer.from_str(text)
    except FileNotFoundError:
        raise Refusal(f"{file}: no such tokenizer; `python -m model import` writes it") from None
    except Exception as error:  # `tokenizers` raises plain Exception
        raise Refusal(f"{file}: is no tokenizer of the `tokenizers` package: {error}") from None
    return text, table
