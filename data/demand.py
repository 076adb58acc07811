"""What a stage asks of the data: nothing else of a stage decides what its rows are."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from data.buckets import Bucket
from data.packing import Pack
from data.positions import Consecutive, Pose


@dataclass(frozen=True)
class Demand:
    """Rows of `sequence_length` tokens for one stage. Sample numbers count the rows of one (stage, length)."""

    stage_index: int
    sequence_length: int
    mixture: Mapping[str, float] = field(default_factory=dict)
    """Source to share of tokens; empty: the sources' own weights."""
    buckets: Mapping[str, tuple[Bucket, ...]] = field(default_factory=dict)
    """Source to shares of its tokens by the length of documents; a source that is not named gives all alike."""
    pack: Pack | None = None
    """None: as the run's `data.pack` says."""
    has_document_mask: bool = True
    """False: attention, positions and labels go over the borders of documents, through the whole row."""
    positions: Consecutive | Pose = field(default_factory=Consecutive)
    stage_length: int | None = None
    """The stage's own length, where rows of several lengths are drawn inside it; None: `sequence_length`."""
    longest_length: int | None = None
    """Of all rows of the stage, which is above its own where rows shrink; None: `sequence_length`."""
    where: str = field(default="", compare=False)
    """What a refusal of the demand begins with: its place in the configuration."""

    def __hash__(self) -> int:
        mappings = tuple(sorted(self.mixture.items())), tuple(sorted(self.buckets.items()))
        return hash(
            (self.stage_index, self.sequence_length, *mappings, self.pack, self.has_document_mask, self.positions)
        )

    @property
    def is_longest(self) -> bool:
        """Whether no rows of the stage are longer."""
        return self.longest_length is None or self.sequence_length >= self.longest_length

    @property
    def key_parts(self) -> tuple[int, ...]:
        """What draws depend on: the stage, and the length where it is not the stage's own.

        Row n of a shorter length would otherwise hide the same needles as row n of the stage's length.
        """
        own = self.stage_length in (None, self.sequence_length)
        return (self.stage_index,) if own else (self.stage_index, self.sequence_length)
