"""The thirteen tasks by name, and what each is made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from data.tokenizer import Tokenizer
from evals.ruler.counting import CommonWords, FrequentWords
from evals.ruler.fill import Maker, fill
from evals.ruler.matching import string_match_all, string_match_part
from evals.ruler.reading import Library, Reading
from evals.ruler.retrieval import Needles, Retrieval
from evals.ruler.templates import COMMON_WORDS, FREQUENT_WORDS, NEEDLES, READING, VARIABLES, Template
from evals.ruler.tracking import EXAMPLE_TOKENS, Tracking, solved
from evals.ruler.words import Words
from settings import Refusal


@dataclass(frozen=True)
class Ingredients:
    """What prompts are made from; None: not given."""

    tokenizer: Tokenizer
    words: Words
    essay: Sequence[str] | None
    squad: Library | None
    hotpotqa: Library | None


@dataclass(frozen=True)
class RulerTask:
    """One of the thirteen."""

    template: Template
    maker: Callable[[Ingredients, int], Maker]
    """What makes its samples of a length."""
    needs: str | None = None
    """The ingredient that it cannot be asked without."""
    match: Callable[[str, Sequence[str]], float] = string_match_all


def retrieval(needles: Needles) -> RulerTask:
    def maker(given: Ingredients, length: int) -> Maker:
        return Retrieval(needles, given.words.keys, given.essay or ())

    return RulerTask(NEEDLES, maker, "essay" if needles.haystack == "essay" else None)


def tracking(given: Ingredients, length: int) -> Maker:
    """With an example that is as large as it may be, and however small that is."""
    example = Tracking(letters=3)

    def measure(size: int) -> int:
        return len(given.tokenizer.encode(solved(example.make(Random(0), 0, size))))

    try:
        size = fill(measure, EXAMPLE_TOKENS, example.smallest, example.largest, guess=2 * example.smallest)
    except Refusal:
        # A tokenizer that needs more tokens than RULER thought of, such as one of bytes.
        size = example.smallest
    return Tracking().after(example, size)


def common_words(given: Ingredients, length: int) -> Maker:
    return CommonWords(given.words.counted, given.words.keys, length)


def frequent_words(given: Ingredients, length: int) -> Maker:
    return FrequentWords(length)


def squad(given: Ingredients, length: int) -> Maker:
    assert given.squad is not None, "checked before"
    return Reading(given.squad)


def hotpotqa(given: Ingredients, length: int) -> Maker:
    assert given.hotpotqa is not None, "checked before"
    return Reading(given.hotpotqa)


RULER_TASKS = {
    "niah_single_1": retrieval(Needles("noise")),
    "niah_single_2": retrieval(Needles("essay")),
    "niah_single_3": retrieval(Needles("essay", values="uuids")),
    "niah_multikey_1": retrieval(Needles("essay", num_keys=4)),
    "niah_multikey_2": retrieval(Needles("needle")),
    "niah_multikey_3": retrieval(Needles("needle", keys="uuids", values="uuids")),
    "niah_multivalue": retrieval(Needles("essay", num_values=4)),
    "niah_multiquery": retrieval(Needles("essay", num_queries=4)),
    "vt": RulerTask(VARIABLES, tracking),
    "cwe": RulerTask(COMMON_WORDS, common_words),
    "fwe": RulerTask(FREQUENT_WORDS, frequent_words),
    "qa_1": RulerTask(READING, squad, "squad", string_match_part),
    "qa_2": RulerTask(READING, hotpotqa, "hotpotqa", string_match_part),
}
