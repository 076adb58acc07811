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
class Work:
    """What cannot be done in no time: see `planning.roofline`."""

    flops: float = 0.0
    moved: float = 0.0
    """Bytes between the device and its memory."""
    inside: float = 0.0
    """Seconds that what is sent takes through links inside nodes, at the bandwidth that collectives sustain."""
    across: float = 0.0
    """The same of links between nodes."""

    def times(self, factor: float) -> "Work":
        return Work(factor * self.flops, factor * self.moved, factor * self.inside, factor * self.across)

    def __add__(self, other: "Work") -> "Work":
        inside, across = self.inside + other.inside, self.across + other.across
        return Work(self.flops + other.flops, self.moved + other.moved, inside, across)


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
    work: Work = Work()

    @property
    def exposed(self) -> float:
        return self.seconds - self.hidden

    def times(self, factor: float) -> "Part":
        more = (self.seconds * factor, self.hidden * factor, self.sent * factor)
        return Part(self.name, *more, self.is_sent, self.work.times(factor))


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
        old = merged.get(part.name)
        merged[part.name] = part if old is None else _together(old, part)
    return list(merged.values())


def _together(one: Part, other: Part) -> Part:
    return Part(
        one.name,
        one.seconds + other.seconds,
        one.hidden + other.hidden,
        one.sent + other.sent,
        one.is_sent or other.is_sent,
        one.work + other.work,
    )
