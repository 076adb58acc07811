"""Which words stand most often in a list: common words among rarer ones, and coded words whose counts fall off fast.

Source: NVIDIA/RULER, scripts/data/synthetic/common_words_extraction.py and freq_words_extraction.py. Mended: lists are
shuffled by the sample's own generator, where RULER's fixed seed gives all samples of a size the same places; the coded
text leaves room for the answer; and it has words enough that the third and fourth most frequent never tie.
"""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from evals.ruler.fill import UNBOUNDED, Sample
from evals.ruler.templates import COMMON_WORDS, FREQUENT_WORDS

COMMON = 10
"""Words to be named."""
LONG = 4096
"""From this length on words are repeated more often."""
CODED_LETTERS = 6
TOKENS_PER_CODED_WORD = 50
"""The vocabulary grows with the length: one coded word for so many tokens."""
LEAST_CODED = 5
"""The noise, the three to be named and one that is not."""
UNTIED = math.ceil(math.pi**2 / 6 / (1 / 16 - 1 / 25))
"""Words of coded text from which ranks 4 and 5 are a whole word apart."""


@dataclass(frozen=True)
class CommonWords:
    """A maker: sizes are different words in the list."""

    words: Sequence[str]
    more_words: Sequence[str]
    """Drawn from where `words` are too few."""
    length: int
    smallest: int = COMMON + 1

    @property
    def largest(self) -> int:
        return max(len(self.words), len(self.more_words))

    def make(self, random: Random, number: int, size: int) -> Sample:
        """See Maker."""
        is_long = self.length >= LONG
        example = self._ask(random, *((40, 10, 3) if is_long else (20, 3, 1)))
        sample = self._ask(random, size, *((30, 3) if is_long else (6, 1)))
        return Sample(f"{example.prompt}{example.answer}\n{sample.prompt}", sample.answer, sample.references)

    def _ask(self, random: Random, num_words: int, often: int, seldom: int) -> Sample:
        words = random.sample(self.words if num_words <= len(self.words) else self.more_words, num_words)
        common = words[:COMMON]
        repeated = common * often + words[COMMON:] * seldom
        random.shuffle(repeated)
        return Sample(COMMON_WORDS.fill(context=numbered(repeated)), " " + numbered(common), tuple(common))


@dataclass(frozen=True)
class FrequentWords:
    """A maker: sizes are words of coded text, before counts are rounded down."""

    length: int
    smallest: int = UNTIED
    largest: int = UNBOUNDED

    def make(self, random: Random, number: int, size: int) -> Sample:
        """See Maker."""
        coded: dict[str, None] = {}
        while len(coded) < max(LEAST_CODED, self.length // TOKENS_PER_CODED_WORD):
            coded["".join(random.choices(string.ascii_lowercase, k=CODED_LETTERS))] = None
        # The most frequent is noise.
        ranked = ["...", *list(coded)[1:]]
        # Rank k stands size / (zeta(2) k^2) times.
        counts = [int(size * 6 / (math.pi * rank) ** 2) for rank in range(1, len(ranked) + 1)]
        text = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        random.shuffle(text)
        answers = ranked[1:4]
        return Sample(FREQUENT_WORDS.fill(context=" ".join(text)), " " + ", ".join(answers), tuple(answers))


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, start=1))
