"""By memory budget: of each layer as little is run again as a rank's memory allows.

What a rank needs at its worst moment grows with two numbers: what its layers keep together, and the most that there is
when one of them makes gradients, which is what the layers below it keep and its own needs. So choices of all layers are
gone through from the first to the last, and of those to one layer only such are held on to that no other beats in
operations and in both numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from model.block import Kind
from parallel.recompute import KINDS

MOST = 4000
"""Choices that are held on to from layer to layer; of more, neighbours are left out, and the best may be among them."""


@dataclass(frozen=True)
class Layer:
    """What a layer's kinds come to on one rank."""

    kept: Mapping[Kind, int]
    """Bytes from forward to backward."""
    moment: int
    """Bytes when it makes gradients, beside what the layers below it keep."""
    flops: Mapping[Kind, float]
    """Operations that are done again."""


@dataclass(frozen=True)
class Choice:
    """Kinds of the first layers."""

    flops: float = 0.0
    kept: int = 0
    peak: int = 0
    kinds: tuple[Kind, ...] = ()

    def then(self, layer: Layer, kind: Kind) -> "Choice":
        return Choice(
            self.flops + layer.flops[kind],
            self.kept + layer.kept[kind],
            max(self.peak, self.kept + layer.moment),
            (*self.kinds, kind),
        )


def cheapest(layers: Sequence[Layer], fits: Callable[[tuple[Kind, ...]], bool]) -> tuple[Kind, ...] | None:
    """The kinds that repeat the fewest operations among those that fit; None where none do.

    fits: may depend on kinds only by what all layers keep and by the peak, and what fits must with less of either.
    """
    choices = [Choice()]
    for layer in layers:
        choices = unbeaten(choice.then(layer, kind) for choice in choices for kind in KINDS)
    too_large = [choices[place] for place in _last_that_does_not(choices, fits)]
    for choice in choices:
        if any(choice.kept >= other.kept and choice.peak >= other.peak for other in too_large):
            continue
        if fits(choice.kinds):
            return choice.kinds
        too_large = [other for other in too_large if other.kept < choice.kept or other.peak < choice.peak] + [choice]
    return None


def _last_that_does_not(choices: Sequence[Choice], fits: Callable[[tuple[Kind, ...]], bool]) -> list[int]:
    """About where choices that need fewer bytes, for more operations, begin to fit: the place before, if there is one.

    Most of those before need more of both, and then nobody has to ask whether they fit.
    """
    low, high = -1, len(choices)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(choices[middle].kinds) else (middle, high)
    return [low] if low >= 0 else []


def unbeaten(choices: Iterable[Choice]) -> list[Choice]:
    """Those of which no other needs as few operations and bytes, in order of operations."""
    left: list[Choice] = []
    stairs: list[tuple[int, int]] = []  # (kept, peak) of those so far that no other is below of
    for choice in sorted(choices, key=lambda each: (each.flops, each.kept, each.peak)):
        if not any(kept <= choice.kept and peak <= choice.peak for kept, peak in stairs):
            left.append(choice)
            stairs = [(k, p) for k, p in stairs if k < choice.kept or p < choice.peak]
            stairs.append((choice.kept, choice.peak))
    return left if len(left) <= MOST else [*left[: -1 : len(left) // MOST + 1], left[-1]]
