"""Text for needles to lie in: words of an essay, and the places between its sentences."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random

from evals.scoring import Materials
from evals.windows import documents_in
from settings import Refusal

DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""Percent of the sentences before a needle: RULER draws from these forty, each at most once."""
SENTENCE_END = re.compile(r"""(?<=[.!?])\s+|(?<=[.!?]["')\]])\s+""")
LONGEST_SENTENCE = 40
"""Words after which a sentence is cut, so that text without full stops has places for needles too."""
TOKENS_PER_LENGTH = 4
"""Held-out text is read up to so many times the longest length: blanks run together take less room than they did."""


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text, whatever blanks part them."""
    return tuple(text.split())


def read_essay(path: Path) -> tuple[str, ...]:
    """The words of a text file, or of the `text` of a JSON file such as RULER's PaulGrahamEssays.json."""
    try:
        text = path.read_text(encoding="utf-8")
        text = json.loads(text)["text"] if path.suffix == ".json" else text
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise Refusal(
            f"evals.ruler.haystack_file={str(path)!r}: cannot be read as text, or as JSON with a text: {error}"
        ) from None
    return _some(words_of(text), f"evals.ruler.haystack_file={str(path)!r}")


def held_out_essay(materials: Materials, source: str, longest: int) -> tuple[str, ...]:
    """The words at the beginning of a source's held-out text, as many as the longest prompt can take."""
    tokens = materials.held_out[source][: TOKENS_PER_LENGTH * longest]
    parts = documents_in(tokens, materials.tokenizer.end_of_text)
    words = words_of(" ".join(materials.tokenizer.decode(tokens[part]) for part in parts))
    return _some(words, f"evals.ruler.haystack={source!r}")


def sentences_of(words: Sequence[str]) -> list[str]:
    """Sentences, each of at most so many words. RULER asks nltk, which knows abbreviations."""
    sentences = []
    for sentence in SENTENCE_END.split(" ".join(words)):
        parts = sentence.split(" ")
        sentences += [
            " ".join(parts[start : start + LONGEST_SENTENCE]) for start in range(0, len(parts), LONGEST_SENTENCE)
        ]
    return sentences


def first_words(words: Sequence[str], count: int) -> list[str]:
    """So many words from the beginning, begun again where the text is over."""
    return [words[index % len(words)] for index in range(count)]


def hide_in_essay(random: Random, words: Sequence[str], needles: Sequence[str]) -> str:
    """The text with a needle at so many of the forty depths, in their order. Two at one place leave a blank more."""
    sentences = sentences_of(words)
    places = sorted(int(len(sentences) * (depth / 100)) for depth in random.sample(DEPTHS, len(needles)))
    parts, start = [], 0
    for place, needle in zip(places, needles, strict=True):
        parts += [" ".join(sentences[start:place]), needle]
        start = place
    return " ".join([*parts, " ".join(sentences[start:])])


def hide_in_lines(random: Random, lines: Sequence[str], needles: Sequence[str]) -> str:
    """The lines with each needle before another one of them, the first needle farthest back."""
    hidden = list(lines)
    for place, needle in zip(
        sorted(random.sample(range(len(lines)), len(needles)), reverse=True), needles, strict=True
    ):
        hidden.insert(place, needle)
    return "\n".join(hidden)


def _some(words: tuple[str, ...], key: str) -> tuple[str, ...]:
    if not words:
        raise Refusal(f"{key}: holds no words; give another text")
    return words
