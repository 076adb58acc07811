"""What a rank has to do in a step, and what that comes to, part by part."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from context.volume import Volume
from model.transformer import ModelSettings
from parallel.mesh import Grid
from planning.speeds import NONE, Repeats


@dataclass(frozen=True)
class Job:
    """What the ranks of a grid have to do in a step."""

    model: ModelSettings
    vocab_size: int
    grid: Grid
    tokens: int
    """Of a micro-batch, on each rank that has tokens of its own."""
    microbatches: int
    lengths: tuple[int, ...]
    """Of the documents that attention stays inside of, in a row."""
    window: int | None = None
    """How far every layer sees back in training at most."""
    repeats: Repeats = NONE
    schedule: str = "1f1b"
    parts: int = 1
    """Of the model on each rank of a pipeline."""
    counts_first: bool = False
    """Whether routing is counted in a forward pass of its own, for all micro-batches but one."""
    context: int = 1
    volumes: Mapping[str, Volume] = field(default_factory=dict)
    """What a rank sends in a layer of this kind to those that hold rows with it."""


@dataclass(frozen=True)
class Part:
    """Something that a rank does in a step."""

    name: str
    seconds: float
    hidden: float = 0.0
    """Of these, so many run behind something else."""
    sent: float = 0.0
    """Bytes that the rank sends."""
    is_sent: bool = False

    @property
    def exposed(self) -> float:
        return self.seconds - self.hidden

    def times(self, factor: float) -> "Part":
        return Part(self.name, self.seconds * factor, self.hidden * factor, self.sent * factor, self.is_sent)


@dataclass(frozen=True)
class StepTime:
    """A step, part by part."""

    parts: tuple[Part, ...]
    tokens_of_rank: float
    """Of the step's tokens, over all ranks, the share of one."""
    flops_of_rank: float
    """The model's operations that fall to a rank, whoever does them."""
    peak: float

    @property
    def seconds(self) -> float:
        return sum(part.exposed for part in self.parts)

    @property
    def tokens_per_second(self) -> float:
        """For each rank."""
        return self.tokens_of_rank / self.seconds

    @property
    def utilization(self) -> float:
        """The model's operations over what the device could do meanwhile (MFU)."""
        return self.flops_of_rank / self.seconds / self.peak


@dataclass(frozen=True)
class Stage:
    """The layers of a rank, and whether embedding and head are among them."""

    layers: tuple[int, ...]
    has_embedding: bool
    has_head: bool


def merge(parts: Iterable[Part]) -> list[Part]:
    """Parts of one name as one, in the order of their first."""
    merged: dict[str, Part] = {}
    for part in parts:
        old = merged.get(part.name, Part(part.name, 0.0))
        merged[part.name] = Part(
            part.name,
            old.seconds + part.seconds,
            old.hidden + part.hidden,
            old.sent + part.sent,
            old.is_sent or part.is_sent,
        )
    return list(merged.values())
