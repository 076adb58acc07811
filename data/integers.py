"""Plain whole numbers as tokens, for tasks made of random tokens: text is numbers with spaces between."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from settings import Refusal, Section


class IntegersSettings(Section):
    kind: Literal["integers"] = "integers"
    size: int = Field(ge=1, lt=1 << 31)
    """The tokens are 0 .. size - 1; one more id ends a text."""


class IntegersTokenizer:
    """Id n is the number n, written in decimal; `size` itself is the end of a text."""

    def __init__(self, size: int) -> None:
        self.vocab_size, self.end_of_text = size + 1, size
        self.fingerprint = hashlib.sha256(f"whole numbers below {size}, then end of text".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Raises Refusal for a word that is no number below `size`."""
        words = text.split()
        for word in words:
            if not (word.isascii() and word.isdecimal()) or int(word) >= self.end_of_text:
                raise Refusal(
                    f'data.tokenizer kind = "integers" reads numbers below {self.end_of_text} with spaces between, '
                    f'not {word[:40]!r}; use kind = "byte" for text'
                )
        return [int(word) for word in words]

    def encode_bytes(self, text: bytes) -> np.ndarray:
        return np.array(self.encode(text.decode()), dtype=np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return " ".join(str(int(i)) for i in ids if 0 <= i < self.end_of_text)

    def num_bytes(self, ids: np.ndarray) -> int:
        """One for each number, so that bits per byte are bits per token."""
        ids = np.asarray(ids)
        return int(((ids >= 0) & (ids < self.end_of_text)).sum())
