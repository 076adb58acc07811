"""A mask as flash kernels take it: how far queries see back and forth, where the last stands at the last key."""

from dataclasses import dataclass

from attention.mask import Mask


@dataclass(frozen=True)
class Band:
    """Rows of one document, cut to the queries that see a key and the keys that are seen by a query.

    Of T queries over S keys, query t sees keys t + S - T - left to t + S - T + right, both included.
    """

    queries: slice
    keys: slice
    left: int | None
    """None: all keys before."""
    right: int | None
    """None: all keys behind."""


def band_of(T: int, S: int, mask: Mask) -> Band | None:
    """Rows of T queries and S keys under `mask`, which has no documents; None: no query sees anything."""
    if not mask.is_causal:
        return Band(slice(0, T), slice(0, S), None, None) if T and S else None
    offset = S - T if mask.offset is None else mask.offset
    first, stop = max(0, -offset), T
    if mask.window is not None:
        stop = min(stop, S - offset + mask.window - 1)
    low = 0 if mask.window is None else max(0, first + offset - mask.window + 1)
    high = min(S, stop + offset)
    if first >= stop or low >= high:
        return None
    # By how much the last query stands beyond the last key.
    right = stop + offset - high
    left = None if mask.window is None or mask.window >= stop + offset - low else mask.window - 1 - right
    return Band(slice(first, stop), slice(low, high), left, right)
