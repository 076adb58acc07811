"""Bits per byte of held-out text: how well each source is predicted from a window of so many tokens."""

from typing import Annotated, Any

from pydantic import Field, PositiveInt
from torch import nn

from evals.lengths import DISTINCT, Length
from evals.scoring import Cell, Materials, score_rows, sources_of
from evals.windows import digest, read, spread, sum_up, tile
from settings import Refusal, Section


class HeldOutSettings(Section):
    lengths: Annotated[tuple[Length, ...], DISTINCT] = Field(min_length=1)
    """Tokens in a window; nothing before its window is seen."""
    sources: Annotated[tuple[str, ...], DISTINCT] = ()
    """Which sources are read; left out, all that have held-out text."""
    tokens: PositiveInt = 32_768
    """At most so many tokens are read of each source at each length."""


def check(settings: HeldOutSettings, materials: Materials) -> None:
    """Refuse sources that are unknown or shorter than the longest window."""
    longest = max(settings.lengths)
    for name in sources_of(materials, settings.sources, "evals.held_out.sources"):
        available = len(materials.held_out[name])
        if available <= longest:
            raise Refusal(
                f"evals.held_out.lengths={longest} does not fit: source {name!r} has {available} held-out tokens; "
                f"lower it to {max(available - 1, 1)} or less, or name longer sources in evals.held_out.sources"
            )


def run(model: nn.Module, settings: HeldOutSettings, materials: Materials, seed: int) -> list[Cell]:
    """One cell for each source and length: score is bits per byte, extra `loss` nats per token, `low` and `high`.

    `pieces` are (nats, bytes) of stretches of the text, and `text` is its digest: runs with the same can be compared
    piece by piece.

    Windows of all lengths cover the same text as far as the lengths divide the longest, so that columns differ in the
    context alone. Documents in a window do not see each other.
    """
    check(settings, materials)
    end_of_text, block = materials.tokenizer.end_of_text, max(settings.lengths)
    cells = []
    for name in sources_of(materials, settings.sources, "evals.held_out.sources"):
        tokens = materials.held_out[name]
        blocks = spread(len(tokens), block, settings.tokens, seed)
        for length in settings.lengths:
            rows = read(tokens, tile(blocks, block, length), length, end_of_text)
            loss = sum_up(rows.labels_BT, score_rows(model, materials, rows)[1], materials.tokenizer)
            extra: dict[str, Any] = {"loss": loss.per_token, "bytes": loss.num_bytes, **loss.bounds(seed)}
            extra |= {"text": digest(rows), "pieces": loss.pieces()}
            cells.append(Cell(f"held_out/{name}", length, None, loss.bits_per_byte, loss.tokens, extra))
    return cells
