"""Draws docs/layouts.svg, one packed row under each layout, coloured by rank: `python -m docs.draw_layouts`."""

from pathlib import Path

from attention.mask import Documents
from context.layout import KINDS, Layout
from context.plan import Plan, plan

FILE = Path(__file__).with_name("layouts.svg")
LENGTHS = (18, 6, 58, 11, 27, 8)
NUM_RANKS, CHUNKS_PER_RANK = 4, 4
COLOURS = ("#3f7fd0", "#e0803a", "#3a9d6e", "#b0569c")
SIDE, GAP, TOP = 224, 24, 66
"""Of a panel, between panels and above them, in pixels."""
MEAN = 72
"""Of a bar of mean work."""
STYLE = (
    ".t{fill:#22303f;font-size:15px}.n{fill:#7a8794}.f{fill:#eef3f8}.e{stroke:#fff}"
    ".m{stroke:#7a8794;stroke-dasharray:3 3}"
    "@media (prefers-color-scheme:dark){.t{fill:#e8eef4}.n{fill:#9aa8b6}.f{fill:#22303f}.e{stroke:#0d1117}}"
)


def main() -> None:
    FILE.write_text(picture())


def picture() -> str:
    """The whole drawing, as SVG; a function of the plans alone."""
    width, height = 3 * SIDE + 4 * GAP, TOP + SIDE + 108
    panels = "".join(panel(kind, GAP + number * (SIDE + GAP)) for number, kind in enumerate(KINDS))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif"'
        f' font-size="13" role="img">\n<title>One packed row over {NUM_RANKS} ranks under each layout</title>\n'
        f"<style>{STYLE}</style>\n{panels}</svg>\n"
    )


def panel(kind: str, left: int) -> str:
    """One layout: owners along the top, the mask below (queries down, keys across), and each rank's work as a bar."""
    total = sum(LENGTHS)
    layout = Layout.make(kind, 1, total, NUM_RANKS, LENGTHS, chunks_per_rank=CHUNKS_PER_RANK)
    made, scale = plan(layout, Documents(LENGTHS)), SIDE / total
    parts = [f'<text class="t" x="0" y="20">{kind}</text>']
    parts.append(f'<text class="n" x="{SIDE}" y="20" text-anchor="end">max / mean {made.balance:.2f}</text>')
    parts.append(f'<rect class="f" y="{TOP - 2}" width="{SIDE}" height="{SIDE}"/>')
    for rank, piece in layout.all_pieces:
        x, width = scale * piece.start, scale * piece.length
        parts.append(f'<rect class="e" fill="{COLOURS[rank]}" x="{x:.1f}" y="38" width="{width:.1f}" height="16"/>')
    for rank in range(NUM_RANKS):
        parts.append(f'<g fill="{COLOURS[rank]}" transform="translate(0 {TOP - 2}) scale({scale:.4f})">')
        parts.append(f'<path d="{triangles(made, rank)}"/><path fill-opacity=".55" d="{rectangles(made, rank)}"/></g>')
        parts.append(bar(made, rank))
    parts.append(f'<path class="m" d="M{MEAN} {TOP + SIDE + 8}v92"/>')
    return f'<g transform="translate({left} 0)">\n' + "\n".join(parts) + "\n</g>\n"


def triangles(made: Plan, rank: int) -> str:
    """What a rank sees of its own pieces, as an SVG path in tokens."""
    documents = made.diagonal(rank).documents
    assert documents is not None
    path, pieces, filled = "", iter(made.layout.pieces(rank)), 0
    piece = next(pieces)
    for length in documents.lengths:
        if filled == piece.length:
            piece, filled = next(pieces), 0
        start = piece.start + filled
        path += f"M{start} {start}v{length}h{length}z"
        filled += length
    return path


def rectangles(made: Plan, rank: int) -> str:
    """A rank's tiles, as an SVG path in tokens."""
    return "".join(
        f"M{tile.key.start} {tile.query.start}h{tile.key.stop - tile.key.start}"
        f"v{tile.query.stop - tile.query.start}h{tile.key.start - tile.key.stop}z"
        for tile in made.tiles(rank)
    )


def bar(made: Plan, rank: int) -> str:
    """A rank's work beside the others'."""
    y, length = TOP + SIDE + 14 + 22 * rank, MEAN * made.work[rank] * NUM_RANKS / sum(made.work)
    return (
        f'<rect fill="{COLOURS[rank]}" y="{y}" width="{length:.1f}" height="14" rx="2"/>'
        f'<text class="n" x="{SIDE}" y="{y + 12}" text-anchor="end">rank {rank}</text>'
    )


if __name__ == "__main__":
    main()
