"""Text to token ids and back: plain bytes, or byte-level BPE trained by one engine and encoded by another."""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
import tiktoken
import tokenizers
from pydantic import Field

from data.integers import IntegersSettings, IntegersTokenizer
from data.published import PublishedSettings, PublishedTokenizer
from settings import Refusal, Section

END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class ByteSettings(Section):
    kind: Literal["byte"] = "byte"


class BpeSettings(Section):
    kind: Literal["bpe"] = "bpe"
    file: str
    """A file made by `python -m data train-tokenizer`."""


AnyTokenizerSettings = ByteSettings | BpeSettings | PublishedSettings | IntegersSettings
TokenizerSettings = Annotated[AnyTokenizerSettings, Field(discriminator="kind")]


class Tokenizer(Protocol):
    """What every tokenizer can do; ids lie in 0..vocab_size-1 and `end_of_text` is the id that closes a document."""

    vocab_size: int
    end_of_text: int
    fingerprint: str
    """sha256 of everything that decides which ids a text gets."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text; `end_of_text` never comes from text."""
        ...

    def encode_bytes(self, text: bytes) -> np.ndarray:
        """The ids of UTF-8 text, quickly: (N,) of an unsigned type."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of these ids; broken UTF-8 becomes U+FFFD, `end_of_text` becomes nothing."""
        ...

    def num_bytes(self, ids: np.ndarray) -> int:
        """Bytes of text that these ids stand for; negative ids (no target) and `end_of_text` stand for none."""
        ...


def build_tokenizer(settings: AnyTokenizerSettings) -> Tokenizer:
    """The tokenizer that the settings name. Raises Refusal where its file is missing or not what it should be."""
    if isinstance(settings, PublishedSettings):
        return PublishedTokenizer(settings)
    if isinstance(settings, IntegersSettings):
        return IntegersTokenizer(settings.size)
    return BpeTokenizer(Path(settings.file)) if isinstance(settings, BpeSettings) else ByteTokenizer()


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8, 256 is the end of a text."""

    vocab_size = 257
    end_of_text = 256
    fingerprint = hashlib.sha256(b"utf-8 bytes, then end of text").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_bytes(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def num_bytes(self, ids: np.ndarray) -> int:
        ids = np.asarray(ids)
        return int(((ids >= 0) & (ids < 256)).sum())


class BpeTokenizer:
    """Byte-level BPE with GPT-2's split pattern: merges trained by `tokenizers`, text encoded by tiktoken.

    tiktoken encodes about seven times faster; the ids are the same as ranks are ids. `end_of_text` is the last id.
    """

    def __init__(self, file: Path) -> None:
        vocabulary = _read_vocabulary(file)
        if END_OF_TEXT not in vocabulary:
            raise Refusal(f"{file}: has no token {END_OF_TEXT!r}; make it with `python -m data train-tokenizer`")
        self.end_of_text = vocabulary.pop(END_OF_TEXT)
        self.vocab_size = self.end_of_text + 1
        ranks = {_bytes_of(token): rank for token, rank in vocabulary.items()}
        if sorted(ranks.values()) != list(range(self.end_of_text)) or len(ranks) != self.end_of_text:
            raise Refusal(f"{file}: ids must be 0..{self.end_of_text - 1} without gaps; train the tokenizer anew")
        self._encoding = tiktoken.Encoding(
            file.stem,
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
        )
        self._bytes_of_id = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in ranks.items():
            self._bytes_of_id[rank] = len(token)
        tokens = sorted(ranks, key=ranks.__getitem__)
        text = GPT2_PATTERN + "\n" + "\n".join(base64.b64encode(token).decode() for token in tokens)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_bytes(self, text: bytes) -> np.ndarray:
        return self._encoding.encode_to_numpy(text.decode("utf-8"), disallowed_special=())

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._encoding.decode([int(i) for i in ids if 0 <= i < self.end_of_text], errors="replace")

    def num_bytes(self, ids: np.ndarray) -> int:
        ids = np.asarray(ids)
        return int(self._bytes_of_id[ids[ids >= 0]].sum())


def train_bpe(texts: Iterable[str], vocab_size: int, out_file: Path) -> BpeTokenizer:
    """Train byte-level BPE on these texts and write it as one JSON file, which the `tokenizers` package reads too."""
    if vocab_size < 258:
        raise Refusal(f"vocab_size={vocab_size} must be at least 258: 256 bytes, one merge and the end of text")
    if out_file.is_dir():
        raise Refusal(f"{out_file}: is a folder; name the file to write, such as {out_file / 'tokenizer.json'}")
    try:
        out_file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"{out_file.parent}: cannot be a folder ({error.strerror}); give another file") from None
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    # Added last, so that ids below it are ranks of merges and nothing else.
    engine.add_special_tokens([END_OF_TEXT])
    beside = out_file.with_name(out_file.name + ".partial")
    try:
        engine.save(str(beside))
        beside.replace(out_file)
    finally:
        beside.unlink(missing_ok=True)
    return BpeTokenizer(out_file)


def _read_vocabulary(file: Path) -> dict[str, int]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in table["added_tokens"]}
        return {**table["model"]["vocab"], **added}
    except FileNotFoundError:
        raise Refusal(
            f"{file}: no such tokenizer; make it with `python -m data train-tokenizer SOURCE {file}`"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise Refusal(
            f"{file}: not a byte-level BPE tokenizer ({error}); make it with `python -m data train-tokenizer`"
        ) from None


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable letter: itself where it prints, else the next from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTERS = _byte_of_letter()


def _bytes_of(token: str) -> bytes:
    return bytes(_LETTERS[letter] for letter in token)
