"""The rule for what a task is asked at, every length that is named, once, or none of them; and what was trained."""

from collections.abc import Sequence
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

from context.stages import Stages
from data.positions import LONGEST
from settings import Refusal

Length = Annotated[int, Field(ge=1, le=LONGEST)]
"""Tokens of a row or a part of it."""
Samples = Annotated[int, Field(ge=1, le=1_000_000)]
"""Of one kind: bounded, as all of them are asked."""
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


def trained_length(stages: Stages, tokens: int) -> int:
    """The longest rows, so far, of the stage that the step which ended at `tokens` tokens belonged to.

    Where the length grows inside the stage, that is not yet the length that it leads to.
    """
    last = stages.last_step(tokens)
    steps = last.stage.first_steps()
    return max(step.sequence_length for step in steps if step.start_tokens <= last.start_tokens)
