"""How long collectives take along an axis of the grid: latency and bandwidth of the slowest link they cross.

Arithmetic alone. Ranks of a node are joined by one kind of link and nodes by another; each rank has a network card of
its own. A ring over nodes therefore has as many cards side by side as the group has ranks on a node, while what one
rank sends to ranks of other nodes goes through its own card.
"""

import math
from dataclasses import dataclass

from parallel.mesh import Axis, Grid


@dataclass(frozen=True)
class Link:
    """One way from a rank to another."""

    bandwidth: float
    """Bytes a second in one direction that collectives sustain."""
    latency: float
    """Seconds of a hop."""


@dataclass(frozen=True)
class Links:
    """What joins the ranks of a run."""

    inside: Link
    """Between ranks of a node."""
    across: Link
    """Between nodes, for each rank."""
    ranks_per_node: int = 8
    start: float = 0.0
    """Seconds that any collective takes before its first byte moves."""


@dataclass(frozen=True)
class Line:
    """The ranks of a group as they lie on nodes."""

    length: int
    inside: int
    """How many of them share a node, where fewest do."""
    links: Links

    @property
    def nodes(self) -> int:
        return self.length // self.inside

    @property
    def bandwidth(self) -> float:
        """Of a ring, for each rank: that of a node's cards together where it leaves the node."""
        links = self.links
        if self.nodes == 1:
            return links.inside.bandwidth
        beside = self.inside * links.across.bandwidth
        return beside if self.inside == 1 else min(links.inside.bandwidth, beside)

    @property
    def latency(self) -> float:
        """Once around a ring."""
        if self.length == 1:
            return 0.0
        across = self.nodes - 1
        return self.links.start + across * self.links.across.latency + self._hops_inside * self.links.inside.latency

    @property
    def _hops_inside(self) -> int:
        return self.length - 1 - (self.nodes - 1)


def line(grid: Grid, axis: Axis, links: Links, context: int = 1) -> Line:
    """A group along an axis. context: how many ranks hold a row together, for that axis."""
    stride, length = grid.line(axis, context)
    # Of neighbours so far apart, as many are on a node as fit; groups that do not begin with a node share that number.
    fit = links.ranks_per_node // stride
    return Line(length, math.gcd(length, fit) if fit > 1 else 1, links)


def gather_bytes(line: Line, whole: float) -> float:
    """What each rank sends in an all-gather to, or a reduce-scatter of, so many bytes."""
    return whole * (line.length - 1) / line.length


def gather_time(line: Line, whole: float) -> float:
    """Seconds of an all-gather to `whole` bytes on every rank, or of a reduce-scatter of as many."""
    return gather_bytes(line, whole) / line.bandwidth + line.latency


def reduce_time(line: Line, whole: float) -> float:
    """Seconds of an all-reduce of so many bytes: a reduce-scatter and an all-gather."""
    return 2 * gather_time(line, whole)


def exchange_time(line: Line, inside: float, across: float) -> float:
    """Seconds of an all-to-all in which each rank sends so many bytes to its node, and to others; both at a time."""
    if line.length == 1:
        return 0.0
    links = line.links
    hop = links.across.latency if line.nodes > 1 else links.inside.latency
    return max(inside / links.inside.bandwidth, across / links.across.bandwidth) + links.start + hop


def send_time(line: Line, size: float) -> float:
    """Seconds to send so many bytes to a neighbour, by the slower way where neighbours lie on other nodes."""
    if line.length == 1:
        return 0.0
    link = line.links.inside if line.nodes == 1 else line.links.across
    return size / link.bandwidth + line.links.start + link.latency


def split_sent(line: Line, per_rank: float) -> tuple[float, float]:
    """(bytes to ranks of this node, to others) where each other rank of a line gets so many."""
    return per_rank * (line.inside - 1), per_rank * (line.length - line.inside)


def ranks_met(num_ranks: int, num_experts: int, chosen: int) -> float:
    """How many of the ranks that share experts in equal parts a token meets on average, if it chooses evenly."""
    apart = num_experts - num_experts // num_ranks
    missed = math.prod((apart - k) / (num_experts - k) for k in range(min(chosen, num_experts)))
    return num_ranks * (1 - max(missed, 0.0))
