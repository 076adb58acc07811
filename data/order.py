"""The order of data in integer arithmetic alone: keys, counted random numbers, and a permutation without a table.

Library random streams may change between versions; these numbers never do, so a run continues anywhere as it began.
"""

import hashlib

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
ROUNDS = 6

_STEP, _FIRST, _SECOND = np.uint64(GOLDEN), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


def scramble(numbers: np.ndarray) -> np.ndarray:
    """Send each uint64 to another one, one to one and without visible pattern (SplitMix64's finaliser, Steele 2014).

    An array of at least one dimension: numpy wraps those silently, as is meant here, and warns of scalars.
    """
    numbers = numbers + _STEP
    numbers = (numbers ^ (numbers >> _30)) * _FIRST
    numbers = (numbers ^ (numbers >> _27)) * _SECOND
    return numbers ^ (numbers >> _31)


def derive(*parts: int | str) -> int:
    """A 64-bit key from names and numbers; any change of any part gives another key."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def counted(keys: np.ndarray | int, counter: np.ndarray | int) -> np.ndarray:
    """The `counter`-th uint64 of each key's stream; shapes broadcast, at least one dimension."""
    keys = np.atleast_1d(np.asarray(keys, dtype=np.uint64))
    counters = np.atleast_1d(np.asarray(counter, dtype=np.uint64))
    return scramble(keys ^ scramble(counters))


def permute(index: np.ndarray | int, count: int, key: np.ndarray | int) -> np.ndarray:
    """Where each index of 0..count-1 goes under the permutation that `key` names: int64, in the shape of `index`.

    A Feistel network over the next even number of bits, walked until it lands below `count` (Black and Rogaway 2002).
    `key` is one key, or one for each index.
    """
    values, keys = np.asarray(index, dtype=np.uint64), np.asarray(key, dtype=np.uint64)
    if values.size and int(values.max()) >= count:
        raise ValueError(f"index {int(values.max())} lies outside a permutation of {count}")
    shape = np.broadcast_shapes(values.shape, keys.shape)
    if keys.size > 1:
        values, keys = np.broadcast_arrays(values, keys)
    values, keys = values.ravel(), keys.ravel()
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    round_keys = scramble(keys + np.arange(ROUNDS, dtype=np.uint64)[:, None])
    values = _feistel(values, round_keys, half)
    outside = np.flatnonzero(values >= count)
    while outside.size:
        values[outside] = _feistel(values[outside], round_keys[:, outside] if keys.size > 1 else round_keys, half)
        outside = outside[values[outside] >= count]
    return values.astype(np.int64).reshape(shape)


def _feistel(values: np.ndarray, round_keys: np.ndarray, half: int) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for keys in round_keys:
        left, right = right, left ^ (scramble(right ^ keys) & mask)
    return (left << shift) | right
