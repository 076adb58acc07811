"""Which source the i-th sample comes from: the greedy blend, in exact integers, with any range at hand at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from pydantic import Field

UNITS = 1_000_000
CHUNK = 4096

Weight = Annotated[float, Field(ge=0, le=1e12)]
"""A share against others, which need not sum to one; bounded so that their sum is a number."""


@dataclass
class Blend:
    """Samples of several sources in given shares, such that every prefix is as near to the shares as it can be.

    Each sample goes to the source that is furthest behind its share (the rule of Megatron-LM's blended data set), the
    first of equals. Shares are read to six decimals, so that the rule repeats itself and any range can be reached
    without walking there sample by sample. `weights` are shares of tokens: every sample is one row of equal length.
    """

    weights: Sequence[float]
    _active: np.ndarray = field(init=False, repr=False)
    _shares: list[int] = field(init=False, repr=False)
    _period: int = field(init=False, repr=False)
    _chunks: dict[tuple[int, bool, tuple[int, ...]], tuple[np.ndarray, tuple[int, ...]]] = field(
        init=False, repr=False, default_factory=dict
    )
    _behind: list[tuple[int, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(f"weights={list(self.weights)} must be at least one number, none negative, not all zero")
        # A source of weight 0 would win where all are equally late; it takes no part.
        self._active = np.flatnonzero(self.weights)
        self._shares = _to_units([weight for weight in self.weights if weight])
        divisor = int(np.gcd.reduce(self._shares))
        self._shares = [share // divisor for share in self._shares]
        self._period = sum(self._shares)
        self._behind = [(0,) * len(self._shares)]

    def take(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """For samples first..first+count-1: (source, sample's number inside its source), both int64 (count,)."""
        if count == 0:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        chunk, sources = self._chunk_of(first), []
        chunk_start = self._start(chunk)
        while self._start(chunk) < first + count:
            sources.append(self._chunk(chunk))
            chunk += 1
        source = np.concatenate(sources)
        number = np.empty_like(source)
        used_before = self._used(chunk_start, self._behind[self._chunk_of(first)])
        for which, used in enumerate(used_before):
            places = np.flatnonzero(source == which)
            number[places] = used + np.arange(len(places))
        window = slice(first - chunk_start, first - chunk_start + count)
        return self._active[source[window]], number[window]

    # A chunk never crosses a period, so that chunks of later periods meet the same (place, behind) again.
    @property
    def _chunk_length(self) -> int:
        return self._period * max(1, CHUNK // self._period) if self._period <= CHUNK else CHUNK

    @property
    def _chunks_a_period(self) -> int:
        return 1 if self._period <= CHUNK else -(-self._period // CHUNK)

    def _chunk_of(self, sample: int) -> int:
        if self._period <= CHUNK:
            return sample // self._chunk_length
        period, inside = divmod(sample, self._period)
        return period * self._chunks_a_period + inside // CHUNK

    def _start(self, chunk: int) -> int:
        if self._period <= CHUNK:
            return chunk * self._chunk_length
        period, inside = divmod(chunk, self._chunks_a_period)
        return period * self._period + inside * CHUNK

    def _used(self, start: int, behind: tuple[int, ...]) -> list[int]:
        return [(share * start - late) // self._period for share, late in zip(self._shares, behind, strict=True)]

    def _chunk(self, chunk: int) -> np.ndarray:
        while len(self._behind) <= chunk:
            self._chunk(len(self._behind) - 1)
        behind = self._behind[chunk]
        place = (chunk % self._chunks_a_period, chunk == 0, behind)
        if place not in self._chunks:
            length = self._start(chunk + 1) - self._start(chunk)
            self._chunks[place] = _walk(self._shares, self._period, behind, length, is_first=chunk == 0)
        source, behind_after = self._chunks[place]
        if len(self._behind) == chunk + 1:
            self._behind.append(behind_after)
        return source


def _walk(
    shares: list[int], period: int, behind: tuple[int, ...], length: int, is_first: bool
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The greedy rule for `length` samples, from how far each source is behind (in samples times the period)."""
    late, sources = list(behind), []
    for number in range(length):
        # The rule counts the first sample as if one had gone before: the largest share begins.
        lateness = shares if is_first and number == 0 else late
        chosen = lateness.index(max(lateness))
        sources.append(chosen)
        late = [value + share for value, share in zip(late, shares, strict=True)]
        late[chosen] -= period
    return np.array(sources, dtype=np.int64), tuple(late)


def _to_units(weights: Sequence[float]) -> list[int]:
    """Positive weights as positive whole numbers that sum to UNITS, by largest remainders."""
    total = sum(weights)
    exact = [weight / total * UNITS for weight in weights]
    units = [max(int(round(value, 6)), 1) for value in exact]
    by_remainder = sorted(range(len(units)), key=lambda source: units[source] - exact[source])
    for source in by_remainder[: max(0, UNITS - sum(units))]:
        units[source] += 1
    units[units.index(max(units))] += UNITS - sum(units)
    return units
