"""Which position each token of a row is told to have: its place in the document, or with a skip inside (PoSE)."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from data.order import counted
from data.packing import ragged_ranges
from settings import Refusal, Section

LONGEST = 1 << 27
"""The most tokens of a row, and the farthest position: a rank holds whole rows in its memory."""

# The draws of positions have their own place in a row's stream of random numbers.
STREAM = 0x706F7365


class Consecutive(Section):
    """Each token's place in its document."""

    kind: Literal["consecutive"] = "consecutive"


class Pose(Section):
    """PoSE (Zhu et al. 2023, arXiv 2309.10400): train inside the length, with positions that span `reach`."""

    kind: Literal["pose"] = "pose"
    reach: int = Field(ge=2, le=LONGEST)
    """Every position stays below it, and every distance below it can occur."""
    chunks: int = Field(default=2, ge=2, le=16)
    """Stretches of each document that positions run through without a skip; the paper trains with 2."""


AnyPositions = Annotated[Consecutive | Pose, Field(discriminator="kind")]


@dataclass(frozen=True)
class Chunks:
    """How D stretches of tokens are told their positions: place p of stretch d has p + the skips begun by then.

    begins_DX: the place at which each of X chunks begins, rising, the first at 0; skips_DX: what is added to the
    places of that chunk, rising, first 0. int64. A chunk that begins where the next one does holds nothing.
    """

    begins_DX: np.ndarray
    skips_DX: np.ndarray

    def positions(self, lengths_D: np.ndarray) -> np.ndarray:
        """The positions of all stretches end to end, int64 (sum of lengths,)."""
        place_N = ragged_ranges(np.zeros_like(lengths_D), lengths_D)
        positions_N = place_N.copy()
        added_DX = np.diff(self.skips_DX, axis=1, prepend=0)
        for begin_D, added_D in zip(self.begins_DX.T[1:], added_DX.T[1:], strict=True):
            positions_N += np.where(place_N >= np.repeat(begin_D, lengths_D), np.repeat(added_D, lengths_D), 0)
        return positions_N


def chunks_of(settings: Consecutive | Pose, lengths_D: np.ndarray, counts_R: np.ndarray, keys_R: np.ndarray) -> Chunks:
    """The chunks of each stretch; those of a row are a pure function of its key and of the stretches before in it.

    lengths_D: flat, row by row; counts_R: how many of them each row has; keys_R: a number a row (`Batch.keys_B`).
    PoSE as its authors came to train (dwzhu-pku/PoSE, src/train_pose.py): the first chunk begins at 0 and skips are
    uniform. Here borders are uniform too, and chunks are neighbours in the text, which the paper found no worse.
    """
    if isinstance(settings, Consecutive):
        nothing_DX = np.zeros((len(lengths_D), 1), dtype=np.int64)
        return Chunks(nothing_DX, nothing_DX)
    borders = settings.chunks - 1
    stream_R = counted(keys_R.view(np.uint64), STREAM)
    in_row_D = ragged_ranges(np.zeros_like(counts_R), counts_R)
    draws_DX = counted(np.repeat(stream_R, counts_R)[:, None], in_row_D[:, None] * 2 * borders + np.arange(2 * borders))
    choices_D = np.maximum(lengths_D - 1, 1).astype(np.uint64)
    reaches_D = (settings.reach - lengths_D + 1).astype(np.uint64)
    begins_DX = 1 + np.sort((draws_DX[:, :borders] % choices_D[:, None]).astype(np.int64), axis=1)
    skips_DX = np.sort((draws_DX[:, borders:] % reaches_D[:, None]).astype(np.int64), axis=1)
    first_D1 = np.zeros((len(lengths_D), 1), dtype=np.int64)
    return Chunks(np.hstack([first_D1, begins_DX]), np.hstack([first_D1, skips_DX]))


def check_reach(settings: Consecutive | Pose, sequence_length: int) -> None:
    """Refuse positions that cannot hold a row of this length."""
    if isinstance(settings, Pose) and settings.reach < sequence_length:
        raise Refusal(
            f"positions.reach={settings.reach} is below sequence_length={sequence_length}, which needs as many; raise "
            "it to what the model is to reach, or leave positions out"
        )
