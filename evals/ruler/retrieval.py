"""Needles in a haystack, eight ways: one or several keys, values and queries, in noise, an essay or other needles.

Source: NVIDIA/RULER, scripts/data/synthetic/niah.py and scripts/synthetic.yaml. Mended: no needle of the haystack has
an asked key, which a short list of words would make likely. Needles stay in the order of their drawing, where RULER
shuffles them by one fixed seed: keys, values and queries are random either way, and so several values of one key are
asked for in the order in which an essay has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal
from uuid import UUID

from evals.ruler.fill import UNBOUNDED, Sample
from evals.ruler.haystack import first_words, hide_in_essay, hide_in_lines
from evals.ruler.templates import NEEDLE, NEEDLES, NOISE, singular

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Needles:
    """What is hidden where: a row of scripts/synthetic.yaml."""

    haystack: Literal["noise", "essay", "needle"]
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


@dataclass(frozen=True)
class Retrieval:
    """A maker: sizes are words of an essay, lines of noise, or other needles."""

    task: Needles
    words: Sequence[str]
    """What keys of words are drawn from."""
    essay: Sequence[str]
    """Words of the text that essays are the beginning of."""
    largest: int = UNBOUNDED

    @property
    def num_keys(self) -> int:
        return max(self.task.num_keys, self.task.num_queries)

    @property
    def smallest(self) -> int:
        return self.num_keys * self.task.num_values

    def make(self, random: Random, number: int, size: int) -> Sample:
        """See Maker."""
        task = self.task
        keys = self._different_keys(random)
        values = [[draw(random, task.values, self.words) for _ in range(task.num_values)] for _ in keys]
        needles = [self._needle(key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
        asked = random.sample(range(len(keys)), task.num_queries)
        context = self._hide(random, needles, size, set(keys))
        answers = [value for index in asked for value in values[index]]
        is_single = task.num_queries * task.num_values == 1
        prompt = (singular(NEEDLES) if is_single else NEEDLES).fill(
            type_needle_v=task.values[:-1] if is_single else task.values,
            context=context,
            query=listed([keys[index] for index in asked]),
        )
        return Sample(prompt, " " + listed(answers), tuple(answers))

    def _different_keys(self, random: Random) -> list[str]:
        keys: list[str] = []
        while len(keys) < self.num_keys:
            keys += [] if (key := draw(random, self.task.keys, self.words)) in keys else [key]
        return keys

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=self.task.values, key=key, value=value)

    def _hide(self, random: Random, needles: list[str], size: int, taken: set[str]) -> str:
        if self.task.haystack == "essay":
            return hide_in_essay(random, first_words(self.essay, size), needles)
        if self.task.haystack == "noise":
            return hide_in_lines(random, [NOISE] * size, needles)
        others: list[str] = []
        while len(others) < size:
            key, value = draw(random, self.task.keys, self.words), draw(random, self.task.values, self.words)
            others += [] if key in taken else [self._needle(key, value)]
        return hide_in_lines(random, others, needles)


def draw(random: Random, kind: Kind, words: Sequence[str]) -> str:
    """An adjective-noun, a number of seven digits, or a version 4 UUID."""
    if kind == "words":
        return random.choice(words)
    if kind == "numbers":
        return str(random.randint(10**6, 10**7 - 1))
    return str(UUID(int=random.getrandbits(128), version=4))


def listed(items: Sequence[str]) -> str:
    """one; one, and two; one, two, and three."""
    return ", ".join(items[:-1]) + ", and " + items[-1] if len(items) > 1 else items[0]
