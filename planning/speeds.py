"""What planned time rests on: a few shares of what data sheets promise, the same for every model and run.

Those of a device are in its file, `configs/devices/*.toml`.

`benchmarks/published.py` compares what follows from them with runs that others have published; see docs/planning.md for
where each is from, and which runs they were taken from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

KERNELS = ("flash1", "flash2", "flash3", "flex")
"""Of attention, that speeds are known of."""


@dataclass(frozen=True)
class Speeds:
    """How much of a device's best a step reaches, by what it does."""

    product: float = 0.72
    """Of the peak, in products without end."""
    side: float = 128
    """A product of (M, K) by (K, N) takes 1 + side * (1/M + 1/K + 1/N) times as long: how its edges tell."""
    memory: float = 0.85
    """Of the memory's bandwidth, in steps that only pass by it."""
    attention: Mapping[str, float] = field(default_factory=dict)
    """Of the peak, in scores of long rows by this kernel, forward and backward together, which counts 3.5 forwards."""
    half_length: float = 512
    """Keys that a query may see at which attention reaches half of that."""
    fp32: float = 1 / 16
    """Products of routers, in fp32, of the peak."""
    contention: float = 0.15
    """Of the time that a collective runs behind products, so much is added to theirs: they share cores and memory."""


def alike(efficiency: float) -> Speeds:
    """The same share of the peak in all products and scores, and nothing else takes time: as one number tells it."""
    kernels = dict.fromkeys(KERNELS, efficiency * 3.5 / 3)  # 3 forwards are the model's, 3.5 what is done
    return Speeds(efficiency, 0.0, math.inf, kernels, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Repeats:
    """What a layer does once more before its backward pass, as shares of its forward pass."""

    products: float = 0.0
    attention: float = 0.0
    passes: float = 0.0
    exchange: float = 0.0
    """Of the two ways between ranks that share experts."""


NONE = Repeats()
REPEATS: dict[str, Repeats] = {
    "none": NONE,
    "ops": Repeats(products=1.0, passes=1.0),
    "full": Repeats(products=1.0, attention=1.0, passes=1.0, exchange=0.5),  # tokens travel to experts again, not home
}
"""By what a configuration calls it."""


def mean_of(kinds: Sequence[str]) -> Repeats:
    """Of layers that each have their own, as if all did the mean of it."""
    repeats = [REPEATS[kind] for kind in kinds]
    return Repeats(**{name: sum(getattr(each, name) for each in repeats) / len(repeats) for name in vars(NONE)})


@dataclass(frozen=True)
class Framework:
    """How a training program computes and sends, where programs differ."""

    attention: str = "flash2"
    stream: int = 4
    """Bytes of a number between layers."""
    is_fused: bool = False
    """Element-wise steps compiled or written as few kernels."""
    is_loss_fused: bool = False
    gathered: int = 2
    """Bytes in which weights of layers are gathered."""
    gathered_ends: int = 4
    """The same of embedding and head."""
    reduced: int = 4
    """Bytes in which gradients are added up."""
    tensor_in: int = 4
    """Bytes of a number of tokens that are gathered for tensor parallelism."""
    tensor_out: int = 2
    """Bytes of a number of parts of sums that are added up."""
    dispatch: Literal["rank", "node"] = "rank"
    """A token travels once to each rank that has experts of its choice, or once to each node and on from there."""
    reshards: bool = True
    """Weights are given up after the forward pass and gathered again for the backward pass."""
    overlaps_replicas: bool = False
    """Gradients of replicas are added up behind the last backward pass, not after it."""


OURS = Framework()
