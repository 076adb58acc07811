"""The longest rows that a rank's memory has room for, of each stage and with each way to keep less."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import lcm

from context.layout import chunks_of
from context.rates import Continue
from context.stages import Stage
from data.positions import LONGEST
from model.block import Kind
from model.memory import Memory, parts
from parallel.mesh import grid_of
from planning.device import Device
from planning.jobs import framework_of, job_of
from planning.outlook import Row, seconds
from planning.roofline import step_floor
from planning.step_parts import StepTime
from planning.step_time import step_time
from run.config import MOST_TOKENS, RunConfig
from run.metrics import short
from run.needs import gigabytes, kinds_of, needs_of
from settings import Refusal

FILL = 0.9
"""Of a device's memory: what is counted is known within a tenth, and allocators waste some."""
UNIT = 256
"""Tokens that lengths are a multiple of, besides what the layout asks for."""


@dataclass(frozen=True)
class Longest:
    """What fits, and what it takes."""

    length: int
    needed: Memory
    step: StepTime

    @property
    def largest(self) -> tuple[str, int]:
        """The part of memory that there is most of, and its bytes."""
        return max(parts(self.needed), key=lambda part: part[1])


@dataclass(frozen=True)
class Ranks:
    """What there is to train on."""

    number: int
    device: Device

    @property
    def room(self) -> float:
        """Bytes of each that a plan may fill; raises Refusal for a device that does not say how many it has."""
        if self.device.memory is None:
            raise Refusal(f"nothing is known of the memory of {self.device.name}; name a device: --device h200")
        return FILL * self.device.memory


def longest_rows(config: RunConfig, vocab_size: int, ranks: Ranks) -> Iterator[Row]:
    """Of every stage, with what the configuration computes again and with the other ways."""
    own = config.recompute if isinstance(config.recompute, str) else None
    ways: list[Kind] = ["none", "ops", "full"]
    for stage in config.stages:
        for way in sorted(ways, key=lambda way: way != own):
            given = config.model_copy(update={"recompute": way})
            head = {"stage": str(stage.index), "recompute": way + (" (as it is)" if way == own else "")}
            head["ranks a row"] = str(config.row_ranks(stage))
            yield head | _row(longest_of(given, stage, vocab_size, ranks), ranks.device)


def _row(found: Longest | int, device: Device) -> Row:
    if isinstance(found, int):
        return {"longest": "none", "memory": gigabytes(found)}
    (name, size), step = found.largest, found.step
    return {
        "longest": f"{found.length:,}",
        "memory": gigabytes(found.needed.total),
        "most of it": f"{name}, {gigabytes(size)}",
        "a step": seconds(step.seconds),
        "tokens a second, of a rank": short(step.tokens_per_second),
        "MFU": f"{step.utilization:.1%}",
        "limited by": step_floor(step, device).limit,
    }


def longest_of(config: RunConfig, stage: Stage, vocab_size: int, ranks: Ranks) -> Longest | int:
    """The longest rows of a stage that fit; where none do, the bytes that the shortest would need."""
    num_ranks, device = ranks.number, ranks.device
    unit = unit_of(config, stage)

    def needed(times: int) -> Memory:
        given = with_length(config, stage, times * unit, num_ranks)
        return needs_of(given, vocab_size, given.stages[0].longest_step(), num_ranks, device.numbers)

    most = min(LONGEST, MOST_TOKENS // config.parallel.pipeline) // unit
    times = greatest(lambda times: needed(times).total <= ranks.room, most)
    if times == 0:
        return needed(1).total
    given = with_length(config, stage, times * unit, num_ranks)
    step, grid = given.stages[0].longest_step(), grid_of(config.parallel, num_ranks)
    kinds = kinds_of(given, vocab_size, step, num_ranks, device.numbers)
    job = job_of(given, vocab_size, step, grid, (times * unit,), kinds)
    return Longest(times * unit, needed(times), step_time(job, device, framework_of(given, device)))


def greatest(holds: Callable[[int], bool], most: int) -> int:
    """The greatest number from 1 to `most` of which it holds, as of all below; 0: of none."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def unit_of(config: RunConfig, stage: Stage) -> int:
    """What a length has to be a multiple of, so that ranks can share a row out without filling it up."""
    ranks, sequence = config.row_ranks(stage), config.parallel.sequence
    chunks = chunks_of(sequence.layout, sequence.chunks_per_rank) if ranks > 1 else 1
    return lcm(UNIT, ranks * lcm(config.parallel.tensor, chunks))


def with_length(config: RunConfig, stage: Stage, length: int, num_ranks: int) -> RunConfig:
    """The stage alone with rows of this length, one a micro-batch; tokens of a step come as near as they can.

    A pipeline has as many micro-batches as ranks at least.
    """
    ranks = config.row_ranks(stage)
    groups = grid_of(config.parallel, num_ranks).data // ranks
    often = max(config.parallel.pipeline, round(stage.tokens_per_step / (length * groups)))
    tokens = length * groups * min(often, max(1, MOST_TOKENS // length))
    changed = {
        "sequence_length": length,
        "growth": None,
        "gate": None,
        "learning_rate": Continue(),
        "context": ranks,
        "until_tokens": tokens,
        "tokens_per_step": tokens,
    }
    stages = (stage.settings.model_copy(update=changed),)
    context = config.context.model_copy(update={"stages": stages})
    amounts = {"total_tokens": tokens, "tokens_per_step": tokens, "tokens_per_microbatch": length}
    return config.model_copy(update={"context": context, **amounts})
