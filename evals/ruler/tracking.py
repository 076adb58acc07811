"""Variable tracking: which names got a value through a chain of assignments among noise, after one solved example.

Source: NVIDIA/RULER, scripts/data/synthetic/variable_tracking.py: one chain of four hops, names of five letters, of
three in the example. Assignments keep their order. Mended: names are drawn until they differ, in place of a list that
grows out of step; an example that does not fit is made as small as it can be, in place of trying for ever.
"""

import string
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from evals.ruler.fill import UNBOUNDED, Sample
from evals.ruler.templates import NOISE, VARIABLES

HOPS = 4
EXAMPLE_TOKENS = 500
"""The solved example takes at most so many tokens, where its smallest form does."""


@dataclass(frozen=True)
class Tracking:
    """A maker: sizes are lines of noise."""

    letters: int = 5
    example: "Tracking | None" = None
    """What makes the solved example before the question."""
    example_size: int = 0
    smallest: int = HOPS + 1
    largest: int = UNBOUNDED

    def make(self, random: Random, number: int, size: int) -> Sample:
        """See Maker."""
        before = "" if self.example is None else solved(self.example.make(random, number, self.example_size)) + "\n"
        names, value = different_names(random, HOPS + 1, self.letters), str(random.randrange(10_000, 99_999))
        # The blank at the end of an assignment is RULER's.
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {name} = VAR {last} " for last, name in pairwise(names)]
        lines = [NOISE] * size
        for later, (place, line) in enumerate(zip(sorted(random.sample(range(size), len(chain))), chain, strict=True)):
            lines.insert(place + later, line)
        prompt = before + VARIABLES.fill(context="\n".join(lines), query=value, num_v=len(names))
        # A blank at the end of the prompt and one before the answer, both RULER's, as in its solved examples.
        return Sample(prompt, " " + " ".join(names), tuple(names))

    def after(self, example: "Tracking", size: int) -> "Tracking":
        """The same after a solved example of so many lines of noise."""
        return replace(self, example=example, example_size=size)


def solved(sample: Sample) -> str:
    """A question with its answer behind it."""
    return f"{sample.prompt}{sample.answer}\n"


def different_names(random: Random, count: int, letters: int) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(random.choices(string.ascii_uppercase, k=letters))
        names += [] if name in names else [name]
    return names
