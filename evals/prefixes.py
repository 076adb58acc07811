"""Rows that begin alike: what they share is read once, and only what follows once for each row."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

WORTH_SHARING = 0.5
"""Rows are read together that have so much of their length in common; of less, too little would be saved."""


@dataclass(frozen=True)
class Family:
    """Rows that have their first `shared` tokens in common; a row on its own shares none."""

    rows: tuple[int, ...]
    shared: int


def find_families(tokens_BT: np.ndarray) -> list[Family]:
    """Every row in one family. Families of equal size stand together, those that share most first."""
    num_rows, length = tokens_BT.shape
    # Any order in which equal beginnings are neighbours will do: that of bytes is one.
    order = sorted(range(num_rows), key=lambda row: tokens_BT[row].tobytes())
    families, rows, shared = [], order[:1], length
    for previous, row in pairwise(order):
        in_common = _common(tokens_BT[previous], tokens_BT[row])
        if in_common < WORTH_SHARING * length:
            families.append(_family(rows, shared, length))
            rows, shared = [], length
        else:
            shared = min(shared, in_common)
        rows.append(row)
    families.append(_family(rows, shared, length))
    return sorted(families, key=lambda family: (len(family.rows), -family.shared, family.rows))


def batches(families: list[Family], rows_at_once: int) -> Iterator[tuple[np.ndarray, int]]:
    """Families of one size that are read together: (their rows (families, size), what every one of them shares)."""
    for size in dict.fromkeys(len(family.rows) for family in families):
        alike = [family for family in families if len(family.rows) == size]
        for start in range(0, len(alike), rows_at_once):
            part = alike[start : start + rows_at_once]
            yield np.array([family.rows for family in part]), min(family.shared for family in part)


def _family(rows: list[int], shared: int, length: int) -> Family:
    """At least one token is left to each row: rows that are wholly alike still have an answer each."""
    return Family(tuple(sorted(rows)), min(shared, length - 1) if len(rows) > 1 else 0)


def _common(one_T: np.ndarray, other_T: np.ndarray) -> int:
    """How many first tokens two rows have in common."""
    differs_T = one_T != other_T
    return int(differs_T.argmax()) if differs_T.any() else len(one_T)
