"""What each stage of a run will compute and need, told before anything runs: arithmetic on the configuration."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from context.stages import Stage
from data.batches import Batches
from model.memory import Memory
from model.size import attention_flops_per_token, multiplied_weights
from run.config import RunConfig, rows_of_step
from run.demand import demand_of
from run.device import Device
from run.needs import needs_of

SAMPLED_STEPS = 512
"""Steps of a stage that are looked at where its length or window changes from step to step."""

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
    needed: Memory
    """On each rank."""
    seconds: float

    @property
    def flops(self) -> float:
        """The model's operations."""
        return self.weight_flops + self.attention_flops


def forecasts(
    config: RunConfig, vocab_size: int, num_ranks: int, device: Device, documents_of: DocumentsOf
) -> Iterator[Forecast]:
    """Stage by stage; raises Refusal where a step does not divide among the ranks."""
    model = config.model
    weights = multiplied_weights(model, vocab_size)
    # Run again is the forward pass of layers, 2 of 6 operations; not the head, nor attention, whose answer is kept.
    repeated = 2 * (weights - vocab_size * model.width) if config.recompute else 0
    for stage in config.stages:
        step, row_ranks = stage.longest_step(), config.row_ranks(stage)
        attention = attention_of_stage(config, stage, tuple(documents_of(stage)))
        yield Forecast(
            stage=stage,
            num_rows=rows_of_step(config, step, num_ranks // row_ranks),
            row_ranks=row_ranks,
            weight_flops=stage.num_tokens * 6 * weights,
            attention_flops=stage.num_tokens * attention,
            repeated_flops=stage.num_tokens * repeated,
            needed=needs_of(config, vocab_size, step, num_ranks, device.numbers),
            seconds=stage.num_tokens * (6 * weights + attention + repeated) / (device.rate * num_ranks),
        )


def attention_of_stage(config: RunConfig, stage: Stage, documents: tuple[int, ...]) -> float:
    """Operations for a token on average over the stage's steps, as length and window change."""

    @lru_cache
    def of(length: int, window: int | None) -> float:
        return attention_flops_per_token(config.model, pieces(documents, length), window)

    number = min(stage.num_steps, SAMPLED_STEPS)
    steps = [stage.step(place * stage.num_steps // number) for place in range(number)]
    return sum(of(step.sequence_length, step.window) for step in steps) / number


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
