"""How much of a text stands word for word in another: sampled runs of thirteen words, compared as numbers."""

import numpy as np

from data.order import scramble

WORDS = 13
ONE_IN = 16
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


def shingles(text: bytes) -> np.ndarray:
    """Numbers of a text's 13-word runs, sorted: one run in sixteen, chosen by content, so two texts choose alike."""
    parts = [_shingles(text[start : start + CHUNK]) for start in range(0, len(text), CHUNK)]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)


def _shingles(text: bytes) -> np.ndarray:
    codes = CODES[np.frombuffer(text, dtype=np.uint8)]
    is_word = codes > 0
    starts = np.flatnonzero(is_word & ~np.concatenate([[False], is_word[:-1]]))
    if len(starts) < WORDS:
        return np.zeros(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        # A word's polynomial, moved to power 0, is the same wherever the word stands.
        words = np.add.reduceat(codes * POWERS[: len(codes)], starts) * INVERSES[starts]
        words = scramble(words)
        count = len(words) - WORDS + 1
        runs = sum((words[i : i + count] * MIXERS[i] for i in range(WORDS)), np.zeros(count, dtype=np.uint64))
    runs = scramble(runs)
    return runs[runs % np.uint64(ONE_IN) == 0]


class Containment:
    """Which of some texts' shingles were met in other texts, seen one after another."""

    def __init__(self, texts: list[bytes]) -> None:
        self._of_text = [shingles(text) for text in texts]
        self._known = np.unique(np.concatenate(self._of_text)) if texts else np.zeros(0, dtype=np.uint64)
        self._met = np.zeros(len(self._known), dtype=bool)

    def see(self, text: bytes) -> None:
        """Mark what stands in this text too."""
        if len(self._known):
            numbers = shingles(text)
            places = np.searchsorted(self._known, numbers).clip(max=len(self._known) - 1)
            self._met[places[self._known[places] == numbers]] = True

    def shares(self) -> list[float]:
        """For each text, the share of its shingles that were met; 0 for a text too short to have any."""
        found = (self._met[np.searchsorted(self._known, numbers)] for numbers in self._of_text)
        return [float(met.mean()) if len(met) else 0.0 for met in found]
