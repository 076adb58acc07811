"""Draws docs/masks.svg, what each mask lets a query see, from the masks themselves: `python -m docs.draw_masks`."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from attention.mask import Documents, Mask

FILE = Path(__file__).with_name("masks.svg")
DOCUMENTS = Documents((5, 2, 9))


@dataclass(frozen=True)
class Panel:
    """One mask, drawn for T queries over S keys."""

    title: str
    code: str
    mask: Mask
    T: int = 16
    S: int = 16


PANELS = (
    Panel("causal", "Mask()", Mask()),
    Panel("all", "Mask(is_causal=False)", Mask(is_causal=False)),
    Panel("window", "Mask(window=5)", Mask(window=5)),
    Panel("window and first tokens", "Mask(window=5, first_tokens=2)", Mask(window=5, first_tokens=2)),
    Panel("prefix", "Mask(prefix=6)", Mask(prefix=6)),
    Panel("documents", "Mask(documents=d)", Mask(documents=DOCUMENTS)),
    Panel("documents, window", "Mask(window=3, documents=d)", Mask(window=3, documents=DOCUMENTS)),
    Panel("documents, prefixes", "Mask(documents=d, prefix=(3, 0, 5))", Mask(documents=DOCUMENTS, prefix=(3, 0, 5))),
    Panel(
        "documents, window, first tokens",
        "Mask(window=3, documents=d, first_tokens=1)",
        Mask(window=3, documents=DOCUMENTS, first_tokens=1),
    ),
    Panel("fewer queries than keys", "Mask()", Mask(), T=6),
    Panel(
        "documents with other keys",
        "Mask(documents=q, key_documents=k)",
        Mask(documents=Documents((4, 2, 4)), key_documents=Documents((7, 2, 7))),
        T=10,
    ),
    Panel("tile of a window", "Mask(window=12, offset=10)", Mask(window=12, offset=10), T=12),
)

COLUMNS, CELL, GAP, TOP = 4, 13, 32, 46
"""Panels of a row; the sides of a cell, between panels and above them, in pixels."""
SIDE = 16 * CELL
STYLE = (
    ".t{fill:#22303f;font-size:13px}.n{fill:#7a8794;font-size:9px;font-family:ui-monospace,monospace}"
    ".f{fill:#eef3f8}.s{fill:#3f7fd0}.g{stroke:#fff;stroke-width:1}"
    "@media (prefers-color-scheme:dark){.t{fill:#e8eef4}.n{fill:#9aa8b6}.f{fill:#22303f}.g{stroke:#0d1117}}"
)


def main() -> None:
    FILE.write_text(picture())


def as_text(mask: Mask, T: int, S: int, B: int = 1) -> str:
    """A line for each query, `x` where it sees a key; rows of a batch one below the other."""
    rows = mask.dense(B, T, S, "cpu").flatten(0, 1).tolist()
    return "\n".join("".join("x" if is_seen else "." for is_seen in row) for row in rows)


def picture() -> str:
    """The whole drawing, as SVG; a function of the masks alone."""
    rows = -(-len(PANELS) // COLUMNS)
    width, height = COLUMNS * (SIDE + GAP) + GAP, rows * (TOP + SIDE + 10) + 14
    panels = "".join(
        panel(each, GAP + number % COLUMNS * (SIDE + GAP), number // COLUMNS * (TOP + SIDE + 10))
        for number, each in enumerate(PANELS)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif"'
        f' role="img">\n<title>What each mask lets a query see</title>\n<style>{STYLE}</style>\n{panels}</svg>\n'
    )


def panel(drawn: Panel, left: int, top: int) -> str:
    """Queries down, keys across; filled where a query sees a key."""
    width, height = drawn.S * CELL, drawn.T * CELL
    seen, lines = "", as_text(drawn.mask, drawn.T, drawn.S).splitlines()
    for row, line in enumerate(lines):
        column = 0
        for cell, run in groupby(line):
            length = len(list(run))
            if cell == "x":
                seen += f"M{column * CELL} {row * CELL}h{length * CELL}v{CELL}h-{length * CELL}z"
            column += length
    grid = "".join(f"M{x * CELL} 0v{height}" for x in range(1, drawn.S))
    grid += "".join(f"M0 {y * CELL}h{width}" for y in range(1, drawn.T))
    return (
        f'<g transform="translate({left} {top + TOP})">\n<text class="t" y="-20">{drawn.title}</text>'
        f'<text class="n" y="-7">{drawn.code}</text>\n<rect class="f" width="{width}" height="{height}"/>'
        f'<path class="s" d="{seen}"/><path class="g" d="{grid}"/>\n</g>\n'
    )


if __name__ == "__main__":
    main()
