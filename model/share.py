"""What one rank is given to do at a time, and how: what its memory follows from."""

from collections.abc import Sequence
from dataclasses import dataclass

from model.block import Kind
from model.kept import Numbers


@dataclass(frozen=True)
class States:
    """Bytes that a rank has between steps, besides gradients, which are as large as its weights."""

    weights: int
    moments: int
    """The optimizer's."""
    flat: int = 0
    """The most gradients that are added up over ranks in one piece."""


@dataclass(frozen=True)
class Share:
    """What one rank is given to do at a time, and how."""

    num_tokens: int
    """Of one micro-batch, on this rank: of rows that several ranks hold, its part."""
    numbers: Numbers
    recompute: Kind | Sequence[Kind] = "none"
    """What is computed again, of all layers alike or of each."""
    offload: bool = False
    """What layers keep is in host memory, but for one that writes and one that reads; on CPUs nothing moves."""
    loss_chunk: int = 4096
    num_ranks: int = 1
    """All ranks of the run."""
    expert_ranks: int = 1
    """How many hold the experts together."""
    expert_shard_ranks: int = 1
    """How many cut each of those experts among them."""
    shard_ranks: int = 1
    """How many cut all other weights."""
    stays_whole: bool = False
    """Whether what is gathered of weights, and their gradients, are there until the step ends, as pipelines have it."""
    tensor_ranks: int = 1
    """How many cut heads and inner channels, and share out the tokens between layers."""
    row_ranks: int = 1
    """How many hold each row together."""
    methods: tuple[str, ...] = ()
    """How attention reaches over those, by name: see `context.methods`."""
    layers: tuple[int, ...] | None = None
    """Those of this rank; None: all."""
    has_embedding: bool = True
    has_head: bool = True
    in_flight: float = 1.0
    """Micro-batches whose activations are there at a time, as if each went through all of this rank's layers."""
    has_earlier: bool = True
    """Whether gradients of earlier micro-batches are there; else they come one by one as activations go."""
    states: States | None = None
    """None: those of the whole model, where ranks share experts at most."""

    def kind(self, layer: int) -> Kind:
        """What is computed again of one layer."""
        return self.recompute if isinstance(self.recompute, str) else self.recompute[layer]
