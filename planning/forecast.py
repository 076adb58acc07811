"""What each stage of a run will compute and need, told before anything runs: arithmetic on the configuration."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from context.stages import Stage
from context.step_plan import StepPlan
from data.batches import Batches
from model.block import Kind
from model.memory import Memory
from model.repeated import repeated_flops
from model.size import attention_flops_per_token, flops_per_token, multiplied_weights
from parallel.mesh import Grid, grid_of
from planning.device import Device
from planning.jobs import framework_of, job_of
from planning.step_parts import StepTime
from planning.step_time import step_time
from run.config import RunConfig, rows_of_step
from run.demand import demand_of
from run.needs import kinds_of, needs_of

SAMPLED_STEPS = 512
"""Steps of a stage that are looked at where its length or window changes from step to step."""
TIMED_STEPS = 32
"""Of these, whose time is added up."""

DocumentsOf = Callable[[Stage], Sequence[int]]
"""Lengths of what attention stays inside of, in rows of a stage's greatest length."""


@dataclass(frozen=True)
class Forecast:
    """One stage, on ranks of one device."""

    stage: Stage
    num_rows: int
    """Of a micro-batch of the longest rows."""
    row_ranks: int
    """How many ranks hold each row together."""
    weight_flops: float
    """Of all its tokens, forward and backward, without attention."""
    attention_flops: float
    repeated_flops: float
    """What is computed again because it was not kept; no part of the model's operations."""
    kinds: tuple[Kind, ...]
    """What of each layer."""
    needed: Memory
    """On the rank that needs most."""
    step: StepTime
    """The longest step, part by part."""
    seconds: float
    """All its steps."""
    full_flops_per_token: float
    """The model's operations as some count them: as if each token saw all of the longest row, in every layer."""

    @property
    def flops(self) -> float:
        """The model's operations."""
        return self.weight_flops + self.attention_flops


def forecasts(
    config: RunConfig, vocab_size: int, num_ranks: int, device: Device, documents_of: DocumentsOf
) -> Iterator[Forecast]:
    """Stage by stage; raises Refusal where a step does not divide among the ranks."""
    model, grid = config.model, grid_of(config.parallel, num_ranks)
    weights = multiplied_weights(model, vocab_size)
    for stage in config.stages:
        step, row_ranks = stage.longest_step(), config.row_ranks(stage)
        documents = tuple(documents_of(stage))
        attention = attention_of_stage(config, stage, documents)
        kinds = kinds_of(config, vocab_size, step, num_ranks, device.numbers)
        time = partial(_time, config, vocab_size, grid, device, documents, kinds)
        yield Forecast(
            stage=stage,
            num_rows=rows_of_step(config, step, grid.data // row_ranks),
            row_ranks=row_ranks,
            weight_flops=stage.num_tokens * 6 * weights,
            attention_flops=stage.num_tokens * attention,
            repeated_flops=stage.num_tokens * repeated_of_stage(config, stage, documents, kinds, device.kind),
            needed=needs_of(config, vocab_size, step, num_ranks, device.numbers, kinds),
            kinds=kinds,
            step=time(step),
            seconds=stage.num_steps * mean_over_steps(stage, partial(_seconds, time), TIMED_STEPS),
            full_flops_per_token=flops_per_token(model, vocab_size, step.sequence_length, causal=False),
        )


def _time(  # noqa: PLR0917 (a step, and all that it depends on)
    config: RunConfig,
    vocab_size: int,
    grid: Grid,
    device: Device,
    documents: tuple[int, ...],
    kinds: tuple[Kind, ...],
    step: StepPlan,
) -> StepTime:
    lengths = tuple(pieces(documents, step.sequence_length))
    return step_time(job_of(config, vocab_size, step, grid, lengths, kinds), device, framework_of(config, device))


def _seconds(time: Callable[[StepPlan], StepTime], step: StepPlan) -> float:
    return time(step).seconds


def attention_of_stage(config: RunConfig, stage: Stage, documents: tuple[int, ...]) -> float:
    """Operations for a token on average over the stage's steps, as length and window change."""

    def of(step: StepPlan) -> float:
        return attention_flops_per_token(config.model, pieces(documents, step.sequence_length), step.window)

    return mean_over_steps(stage, of, SAMPLED_STEPS)


def repeated_of_stage(
    config: RunConfig, stage: Stage, documents: tuple[int, ...], kinds: tuple[Kind, ...], device: str
) -> float:
    """Operations for a token that are done again, on average over the stage's steps."""

    def of(step: StepPlan) -> float:
        return repeated_flops(config.model, kinds, device, pieces(documents, step.sequence_length), step.window)

    return mean_over_steps(stage, of, SAMPLED_STEPS)


def mean_over_steps(stage: Stage, of: Callable[[StepPlan], float], most: int) -> float:
    """The mean of what steps of a stage come to; of so many at most, and worked out once for those that are alike."""
    number = min(stage.num_steps, most)
    steps = [stage.step(place * stage.num_steps // number) for place in range(number)]
    shapes = Counter((step.sequence_length, step.window) for step in steps)
    one = {(step.sequence_length, step.window): step for step in steps}
    return sum(times * of(one[shape]) for shape, times in shapes.items()) / number


def pieces(documents: Sequence[int], length: int) -> list[int]:
    """The documents in rows of this length, cut where they are longer."""
    return [piece for whole in documents for piece in ([length] * (whole // length) + [whole % length]) if piece]


def whole_rows(stage: Stage) -> Sequence[int]:
    """As if each row were one document: the most that attention can cost."""
    return (stage.longest_step().sequence_length,)


def documents_in(batches: Batches, config: RunConfig) -> DocumentsOf:
    """The documents of the first rows of each stage, as many as one rank's micro-batch would have."""

    def of(stage: Stage) -> Sequence[int]:
        step = stage.longest_step()
        num_rows = rows_of_step(config, step, 1)
        return batches.take(demand_of(step, batches), 0, num_rows, num_rows, 0, 1)[0].mask_lengths

    return of
