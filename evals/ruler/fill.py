"""How much haystack fits: the largest size of a prompt whose tokens keep within a limit."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from settings import Refusal

UNBOUNDED = 1 << 40
INTERPOLATED = 8
"""Steps by interpolation before halving takes over, which needs more of them but never crawls."""
GROWTH = 8
"""A prompt is at most so many times larger than the guess, or one known to fit: a wrong slope may promise anything."""


@dataclass(frozen=True)
class Sample:
    """One prompt and what is right."""

    prompt: str
    answer: str
    """As it would stand right behind the prompt: what teacher forcing asks."""
    references: tuple[str, ...]
    """What is looked for in what the model writes."""


class Maker(Protocol):
    """Makes a task's samples; the same generator's state and size give the same one."""

    @property
    def smallest(self) -> int:
        """The least haystack of a sample: sentences, words or documents, as the task has it."""

    @property
    def largest(self) -> int:
        """The most."""

    def make(self, random: Random, number: int, size: int) -> Sample:
        """Sample `number` of its task with so much haystack."""


def fill(measure: Callable[[int], int], room: int, smallest: int, largest: int, guess: int) -> int:
    """A size that fits where one more does not: measure(size) <= room < measure(size + 1), or size == largest.

    Interpolates from `guess` on, as tokens grow nearly in step with the size: two or three prompts are made where
    halving would make log2 of the size. Raises Refusal where the smallest does not fit, in place of trying for ever.
    """
    first = measure(smallest)
    if first > room:
        raise Refusal(f"the smallest prompt takes {first} tokens where {room} are left for it")
    low, low_tokens, high = smallest, first, largest + 1
    tried, trusted = 0, guess
    while low + 1 < high:
        size = min(max(guess, low + 1), high - 1, GROWTH * max(low + 1, trusted))
        tokens = measure(size)
        if tokens <= room:
            low, low_tokens = size, tokens
        else:
            high = size
        tried += 1
        tokens_each = max((tokens - first) / (size - smallest), 0.01)
        guess = low + int((room - low_tokens) / tokens_each) if tried < INTERPOLATED else (low + high) // 2
    return low
