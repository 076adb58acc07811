"""RULER's scores, and what its tables make of them: averages over lengths and the effective length.

Source: NVIDIA/RULER, scripts/eval/synthetic/constants.py and scripts/eval/evaluate.py; README for the averages.
Scores lie between 0 and 1 here, where RULER's tables have percent.
"""

import re
from collections.abc import Mapping, Sequence

THRESHOLD = 0.856
"""What a model must exceed at a length to be called effective there: Llama-2-7B-chat's average at 4K."""

CONTROL = re.compile(r"[\x00-\x1f]")


def cleaned(text: str) -> str:
    """What is scored of a written text: each control character as a line end, blanks around it gone."""
    return CONTROL.sub("\n", text.strip()).strip()


def string_match_all(text: str, references: Sequence[str]) -> float:
    """The share of the references that the text holds, in whatever case."""
    return sum(_holds(text, reference) for reference in references) / len(references)


def string_match_part(text: str, references: Sequence[str]) -> float:
    """1 if the text holds any of the references, in whatever case: they are names of one answer."""
    return float(any(_holds(text, reference) for reference in references))


def _holds(text: str, reference: str) -> bool:
    return reference.lower() in cleaned(text).lower()


def weighted_average(scores: Mapping[int, float], *, increasing: bool) -> float:
    """The mean over lengths with weights 1, 2, 3, ... in their order (increasing), or the other way round."""
    lengths = sorted(scores, reverse=not increasing)
    weights = range(1, len(lengths) + 1)
    return sum(weight * scores[length] for weight, length in zip(weights, lengths, strict=True)) / sum(weights)


def effective_length(scores: Mapping[int, float], threshold: float = THRESHOLD) -> int:
    """The largest asked length whose average exceeds the threshold; 0 if none does."""
    return max((length for length, score in scores.items() if score > threshold), default=0)
