"""RULER's scores by worked examples, and its tables' averages by their published rows."""

import pytest

from evals.ruler.matching import (
    THRESHOLD,
    cleaned,
    effective_length,
    string_match_all,
    string_match_part,
    weighted_average,
)

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
# RULER's README: Llama-3.1 70B, Llama-3.1 8B, Mixtral 8x7B: scores, average, weighted (inc), (dec), effective length.
PUBLISHED = {
    "70B": ((96.5, 95.8, 95.4, 94.8, 88.4, 66.6), 89.6, 85.5, 93.7, 65536),
    "8B": ((95.5, 93.8, 91.6, 87.4, 84.7, 77.0), 88.3, 85.4, 91.3, 32768),
    "8x7B": ((94.9, 92.1, 92.5, 85.9, 72.4, 44.5), 80.4, 72.8, 87.9, 32768),
    "LWM": ((82.3, 78.4, 73.7, 69.1, 68.1, 65.0), 72.8, 69.9, 75.7, 0),
}


def test_all_is_the_share_of_references_found_in_whatever_case() -> None:
    assert string_match_all("They are ABCDE, fghij and more", ["abcde", "FGHIJ", "zzzzz", "MORE"]) == 0.75
    assert string_match_all("12345678", ["1234567"]) == 1, "a part of a longer number is found too, as in RULER"
    assert string_match_all("", ["a", "b"]) == 0


def test_part_is_any_name_of_the_answer() -> None:
    """Three aliases of which one is given: 1, where an average over them would say a third."""
    aliases = ["Denver Broncos", "the Broncos", "Broncos of Denver"]
    assert string_match_part("It was the denver broncos.", aliases) == 1
    assert string_match_all("It was the denver broncos.", aliases) == pytest.approx(1 / 3)
    assert string_match_part("Saint Mary", ["Broncos"]) == 0


def test_control_characters_become_line_ends_first() -> None:
    assert cleaned(" \x00a\tb\x1fc\n\x07") == "a\nb\nc"
    assert string_match_all("new\x0byork", ["new york"]) == 0 and string_match_all("new\x0byork", ["new\nyork"]) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_averages_are_those_of_the_published_table(name: str) -> None:
    scores, average, increasing, decreasing, effective = PUBLISHED[name]
    of_length = {length: score / 100 for length, score in zip(LENGTHS, scores, strict=True)}
    shuffled = dict(sorted(of_length.items(), key=lambda item: item[1]))
    assert sum(scores) / 6 == pytest.approx(average, abs=0.051)
    assert 100 * weighted_average(shuffled, increasing=True) == pytest.approx(increasing, abs=0.051)
    assert 100 * weighted_average(shuffled, increasing=False) == pytest.approx(decreasing, abs=0.051)
    assert effective_length(shuffled) == effective


def test_the_threshold_itself_is_not_enough() -> None:
    assert THRESHOLD == 0.856
    assert effective_length({4096: 0.856}) == 0 and effective_length({4096: 0.8561}) == 4096
    assert effective_length({4096: 0.5, 8192: 0.9}) == 8192, "the largest length above it, whatever lies before"
    assert effective_length({64: 0.4, 128: 0.2}, threshold=0.3) == 64
