"""Cells as text: every cell has its line, with its interval, and columns stand below each other."""

from evals.scoring import Cell
from evals.table import number, table_of

CELLS = [
    Cell("needle", 1024, 0.25, 0.5, 20, {"answer_logprob": -0.25, "low": 0.3, "high": 0.7}),
    Cell("long_ppl/web", 64, None, 12.3456789, 3000, {"load_3": 0.5, "key_share": 0.125}),
    Cell("effective_length/needle", 4096, None, 2048.0, 6, {"threshold": 0.8}),
]


def test_a_line_a_cell():
    lines = table_of(CELLS)
    assert len(lines) == 4 and lines[0].split()[:4] == ["task", "length", "depth", "score"]
    assert lines[1].split() == [
        "needle",
        "1,024",
        "25%",
        "0.5000",
        *["0.3000", "to", "0.7000"],
        "20",
        "answer_logprob",
        "-0.25",
    ]
    assert lines[2].split() == ["long_ppl/web", "64", "12.3457", "3,000", "key_share", "0.125"]
    assert lines[3].split() == ["effective_length/needle", "4,096", "2,048", "6", "threshold", "0.8"]
    ends = {line.index(word) + len(word) for line, word in zip(lines, ("length", "1,024", " 64", "4,096"), strict=True)}
    assert len(ends) == 1


def test_numbers_are_as_long_as_they_say_something():
    assert [number(value) for value in (0.0, 1.0, 0.12345, 512.0, 1234.5, -2.5)] == [
        "0.0000", "1.0000", "0.1235", "512", "1,234", "-2.5000",
    ]  # fmt: skip
    assert number(float("nan")) == "nan"
