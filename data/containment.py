"""How much of a text stands word for word in another: runs of thirteen words, compared as numbers."""

from collections.abc import Collection, Iterator

import numpy as np

from data.order import scramble

WORDS = 13
CHUNK = 1 << 18


def _letter_codes() -> np.ndarray:
    """A code for each byte of a word, the same for both cases; 0 for a byte between words."""
    codes = np.zeros(256, dtype=np.uint64)
    for byte in range(256):
        if (chr(byte).isalnum() and byte < 128) or byte == ord("_") or byte >= 128:
            codes[byte] = (byte | 0x20 if chr(byte).isalpha() and byte < 128 else byte) + 1
    return codes


def _powers(base: int, count: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.cumprod(np.full(count, base, dtype=np.uint64))


BASE = 0x9E3779B97F4A7C15
CODES = _letter_codes()
POWERS = _powers(BASE, CHUNK)
INVERSES = _powers(pow(BASE, -1, 1 << 64), CHUNK)
MIXERS = scramble(np.arange(WORDS, dtype=np.uint64)) | np.uint64(1)


def words(text: bytes) -> Iterator[np.ndarray]:
    """A text's words as numbers, chunk by chunk; the same word has the same number wherever it stands."""
    for start in range(0, len(text), CHUNK):
        letters = np.frombuffer(text[start : start + CHUNK], dtype=np.uint8)
        codes = CODES[letters]
        is_word = codes > 0
        is_start = is_word & ~np.concatenate([[False], is_word[:-1]])
        # Letters of three bytes and more are mostly of scripts written without spaces: each begins a word.
        starts = np.flatnonzero(is_start | (letters >= 0xE0))
        if len(starts):
            # A word's polynomial, moved to power 0.
            yield scramble(np.add.reduceat(codes * POWERS[: len(codes)], starts) * INVERSES[starts])


def runs(words: np.ndarray, sizes: Collection[int]) -> np.ndarray:
    """Numbers of all runs of so many words, for each of these sizes (1..13)."""
    found, total = [np.zeros(0, dtype=np.uint64)], np.zeros_like(words)
    for place in range(min(max(sizes, default=0), len(words))):
        total = total[: len(words) - place] + words[place:] * MIXERS[place]
        if place + 1 in sizes:
            found.append(scramble(total))
    return np.concatenate(found)


class Containment:
    """Which of some texts' runs of words were met in other texts, seen one after another.

    A text of less than thirteen words is one run.
    """

    def __init__(self, texts: list[bytes]) -> None:
        of_text = [list(words(text)) for text in texts]
        size_of_text = [min(WORDS, sum(map(len, chunks))) for chunks in of_text]
        self._sizes = set(size_of_text) - {0}
        self._of_text = [
            np.unique(np.concatenate([runs(chunk, {size}) for chunk in chunks]))
            if size
            else np.zeros(0, dtype=np.uint64)
            for chunks, size in zip(of_text, size_of_text, strict=True)
        ]
        self._known = np.unique(np.concatenate(self._of_text)) if texts else np.zeros(0, dtype=np.uint64)
        self._met = np.zeros(len(self._known), dtype=bool)
        # Most runs are known nowhere; their low bits say so at once.
        self._mask = np.uint64((1 << max(16, (8 * len(self._known)).bit_length())) - 1)
        self._is_likely = np.zeros(int(self._mask) + 1, dtype=bool)
        self._is_likely[self._known & self._mask] = True

    def see(self, text: bytes) -> None:
        """Mark what stands in this text too."""
        for chunk in words(text) if self._sizes else ():
            numbers = runs(chunk, self._sizes)
            numbers = numbers[self._is_likely[numbers & self._mask]]
            places = np.searchsorted(self._known, numbers).clip(max=len(self._known) - 1)
            self._met[places[self._known[places] == numbers]] = True

    def shares(self) -> list[float]:
        """For each text, the share of its different runs that were met; 1 where it has no word to tell it by."""
        found = (self._met[np.searchsorted(self._known, numbers)] for numbers in self._of_text)
        return [float(met.mean()) if len(met) else 1.0 for met in found]
