"""Draws docs/mesh.svg, sixteen ranks and what each axis groups: `python -m docs.draw_mesh`."""

from pathlib import Path

from parallel.mesh import Axis, Grid

FILE = Path(__file__).with_name("mesh.svg")
GRID = Grid(size=16, shard=4, expert=2, tensor=2, pipeline=2)
CONTEXT = 2
PANELS: tuple[tuple[Axis, str], ...] = (
    ("tensor", "the same tokens; heads, channels, vocabulary are cut"),
    ("pipeline", "the layers one after another"),
    ("shard", "weights, gradients and moments are cut"),
    ("expert", "the experts of a layer are shared out, tokens travel"),
    ("context", "each row is cut into its tokens, attention reaches across"),
    ("expert_shard", "those with the same experts cut them among them"),
)
COLOURS = ("#3f7fd0", "#e0803a", "#3a9d6e", "#b0569c", "#8a6d3b", "#5b6bb5", "#c0504d", "#4f9da6")
CELL, GAP, PANEL, HEIGHT = 30, 6, 372, 118
STYLE = (
    ".t{fill:#22303f;font-size:15px;font-weight:600}.n{fill:#7a8794;font-size:12px}.r{fill:#fff;font-size:12px}"
    "@media (prefers-color-scheme:dark){.t{fill:#e8eef4}.n{fill:#9aa8b6}}"
)


def main() -> None:
    FILE.write_text(picture())


def picture() -> str:
    """The whole drawing, as SVG; a function of the grid alone."""
    panels = "".join(
        panel(axis, told, 24 + PANEL * (number % 2), 24 + HEIGHT * (number // 2))
        for number, (axis, told) in enumerate(PANELS)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * PANEL + 24} {3 * HEIGHT + 16}"'
        ' font-family="system-ui, sans-serif" role="img">\n'
        f"<title>Sixteen ranks: pipeline 2, tensor 2, shard 4, expert 2, context 2</title>\n<style>{STYLE}</style>\n"
        f"{panels}</svg>\n"
    )


def panel(axis: Axis, told: str, left: int, top: int) -> str:
    """The ranks, a pipeline stage a row, in one colour where they stand together along the axis."""
    parts = [f'<text class="t" y="12">{axis}</text>', f'<text class="n" x="0" y="28">{told}</text>']
    colours: dict[tuple[int, ...], str] = {}
    per_row = GRID.size // GRID.pipeline
    for rank in range(GRID.size):
        together = tuple(GRID.along(axis, rank, CONTEXT))
        colour = colours.setdefault(together, COLOURS[len(colours) % len(COLOURS)])
        # Tensor ranks stand close together, as they do in a machine.
        x = (rank % per_row) * (CELL + GAP) + (rank % per_row) // GRID.tensor * 6
        y = 38 + rank // per_row * (CELL + 4)
        parts.append(f'<rect fill="{colour}" x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="4"/>')
        parts.append(f'<text class="r" x="{x + CELL / 2:g}" y="{y + 20}" text-anchor="middle">{rank}</text>')
    return f'<g transform="translate({left} {top})">\n' + "\n".join(parts) + "\n</g>\n"


if __name__ == "__main__":
    main()
