"""The rule for what a task is asked at: every length that is named, once, or none of them."""

from collections.abc import Sequence
from typing import TypeVar

from pydantic import AfterValidator

from settings import Refusal

Entries = TypeVar("Entries", bound=tuple[object, ...])


def _distinct(entries: Entries) -> Entries:
    if len(set(entries)) < len(entries):
        raise ValueError("the same entry stands twice; give each once")
    return entries


DISTINCT = AfterValidator(_distinct)
"""Of a key that is an array: the same entry twice would be asked twice, and drawn over itself."""


def check_lengths(key: str, lengths: Sequence[int], least: int, why: str) -> None:
    """Refuse the shortest of `lengths` where it is below `least`: a length left out in silence would look asked."""
    if min(lengths) < least:
        raise Refusal(f"{key}={min(lengths)} does not fit: {why}; use {least} or more")
