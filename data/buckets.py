"""Length buckets: what share of a source's tokens comes from documents of which lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field

from settings import Section


class Bucket(Section):
    """Documents of at least `from_tokens` tokens, up to where the source's next bucket begins.

    Fu et al. 2024 (arXiv 2402.10171, per-source upsampling) keep each domain's share and raise that of its documents
    above 4K from about 0.3 to 0.7; ProLong (Gao et al. 2024, arXiv 2410.02660) takes books and repositories of 64K and
    more alone.
    """

    from_tokens: int = Field(ge=1)
    """Tokens of a document, the one that ends it included."""
    share: float = Field(ge=0, le=1)
    """Share of the source's tokens; what the buckets of a source leave of 1 goes to its shorter documents."""


@dataclass(frozen=True)
class Band:
    """Documents of from_tokens <= length < below_tokens (None: no end), and their share of the source's tokens."""

    from_tokens: int
    below_tokens: int | None
    share: float

    def holds(self, lengths_D: np.ndarray) -> np.ndarray:
        """Which documents lie in it, bool (D,)."""
        is_long_D = lengths_D >= self.from_tokens
        return is_long_D if self.below_tokens is None else is_long_D & (lengths_D < self.below_tokens)

    def __str__(self) -> str:
        if self.below_tokens is None:
            return f"{self.from_tokens:,} tokens or more"
        return f"{self.from_tokens:,} to {self.below_tokens - 1:,} tokens"


def bands_of(buckets: Sequence[Bucket]) -> tuple[Band, ...]:
    """The bands that are drawn from, shortest documents first; those of share 0 are left out.

    Raises ValueError where buckets are out of order, repeat themselves, or do not share out the source's tokens.
    """
    if not buckets:
        raise ValueError("names no length; give a list of { from_tokens, share }, or leave the source out")
    begins = [bucket.from_tokens for bucket in buckets]
    total = sum(bucket.share for bucket in buckets)
    if any(after <= before for before, after in pairwise(begins)):
        raise ValueError(f"from_tokens={begins} must rise from bucket to bucket; sort them and name each length once")
    if not 0 < total < 1 + 1e-9:
        raise ValueError(f"the shares sum to {total:g}; they are shares of one source: above 0 and at most 1 together")
    if begins[0] == 1 and total < 1 - 1e-9:
        raise ValueError(
            f"the shares sum to {total:g}, but no document is shorter than from_tokens=1 to give the rest; "
            f"let them sum to 1, or begin higher"
        )
    rest = max(0.0, 1 - total) if total < 1 - 1e-9 else 0.0
    ends: list[int | None] = [*begins[1:], None]
    bands = [Band(1, begins[0], rest)]
    bands += [Band(bucket.from_tokens, end, bucket.share) for bucket, end in zip(buckets, ends, strict=True)]
    return tuple(band for band in bands if band.share > 0)


def _sensible(buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    bands_of(buckets)
    return buckets


Buckets = dict[str, Annotated[tuple[Bucket, ...], AfterValidator(_sensible)]]
"""Source to its buckets, as a configuration gives them."""
