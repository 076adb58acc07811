"""What ranks of a pipeline do in turn, and how long they wait, counted slot by slot."""

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

from parallel.pipeline_schedule import SCHEDULES

Work = tuple[int, str, int]
"""(part, F, I, W or B for both gradients in one, micro-batch)."""


def order_of(schedule: str, ranks: int, parts_per_rank: int, num_microbatches: int) -> list[list[Work]]:
    """What torch lets each rank do, in order."""

    def stage(index: int, parts: int) -> Any:
        where = {"group_size": ranks, "group_rank": 0, "stage_index": index, "num_stages": parts}
        return SimpleNamespace(submod=None, is_last=False, **where)

    if schedule == "1f1b":
        SCHEDULES[schedule](stage(0, ranks), num_microbatches)
        return [one_by_one(rank, ranks, num_microbatches) for rank in range(ranks)]
    parts = ranks * parts_per_rank
    built = SCHEDULES[schedule]([stage(index, parts) for index in range(0, parts, ranks)], num_microbatches)
    return [work_of(built.pipeline_order[rank]) for rank in range(ranks)]


def one_by_one(rank: int, ranks: int, num_microbatches: int) -> list[Work]:
    """As a rank goes through "1f1b"; torch's own table of it leaves out the last rank's first forward."""
    forwards = [(rank, "F", number) for number in range(num_microbatches)]
    backwards = [(rank, "B", number) for number in range(num_microbatches)]
    ahead = ranks - rank
    pairs = zip_longest(backwards, forwards[ahead:])
    return [*forwards[:ahead], *(each for pair in pairs for each in pair if each is not None)]


def work_of(actions: list[Any]) -> list[Work]:
    """What of a rank's actions is work, in order."""
    found = (re.fullmatch(r"(\d+)([FIBW])(\d+)", str(action)) for action in actions if action is not None)
    return [(int(each[1]), each[2], int(each[3])) for each in found if each]


def waiting(order: list[list[Work]], parts: int) -> list[Fraction]:
    """The share of the whole time in which each rank has nothing to do, counted slot by slot.

    A forward pass through a part takes one slot, as do an input's gradient and a weight's; both gradients in one take
    two. A rank does in order what it has to do, each thing as soon as what it needs is there.
    """
    ends: dict[Work, int] = {}
    queues = [list(works) for works in order]
    clocks, busy = [0] * len(order), [0] * len(order)
    while any(queues):
        before = sum(map(len, queues))
        for rank, queue in enumerate(queues):
            while queue and all(need in ends for need in needed(*queue[0], parts)):
                part, kind, number = queue.pop(0)
                length = 2 if kind == "B" else 1
                start = max([clocks[rank], *(ends[need] for need in needed(part, kind, number, parts))])
                clocks[rank] = ends[part, "I" if kind == "B" else kind, number] = start + length
                busy[rank] += length
        assert sum(map(len, queues)) < before, "ranks wait for each other"
    whole = max(clocks)
    return [Fraction(whole - each, whole) for each in busy]


def needed(part: int, kind: str, number: int, parts: int) -> Iterator[Work]:
    """What has to be done before."""
    if kind == "F" and part:
        yield part - 1, "F", number
    if kind in "IB":
        yield (part + 1, "I", number) if part + 1 < parts else (part, "F", number)
    if kind == "W":
        yield part, "I", number
