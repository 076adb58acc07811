"""What a report's page is made of: sections of text, numbers and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from run.facts import RunFacts
from run.figures import Mark, Panel, encode, panels, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """One PNG, base64; one that `is_framed` has its own white ground, another takes the page's."""

    alt: str
    png: str
    is_framed: bool = False


@dataclass(frozen=True)
class ReportSection:
    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)
    table: Sequence[Mapping[str, str]] = ()
    """Rows of the same columns, title to text; it stands above the pictures."""
    points: Sequence[str] = ()
    """Sentences, one below the other, above the table."""


def drawn(alt: str, figure: "Figure") -> Picture:
    """A figure as a picture of the page."""
    return Picture(alt, encode(png(figure)))


def lines(alt: str, content: Sequence[Panel], facts: RunFacts, columns: int = 1) -> Picture:
    """Panels side by side; on those against tokens it is marked where a stage begins."""
    marks = [Mark(stage.start_tokens, f"length {stage.sequence_length}") for stage in facts.stages[1:]]
    marks = [mark for mark in marks if mark.tokens <= facts.tokens]
    return drawn(alt, panels(content=content, marks=marks, columns=columns))
