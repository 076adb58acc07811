"""What the numbers of tokens in a run have to be to one another, and which other ones would do.

A step holds whole micro-batches, those hold whole rows, and the last stage ends with the run. Where something does not
divide, one number is in the wrong and nobody can know which: each way out that is offered has been tried.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from context.lengths import divisors, nearest_divisors
from context.stages import Stages, StageSettings
from settings import Refusal

Change = tuple[str, int]
"""A key and what it may be instead."""


@dataclass(frozen=True)
class Amounts:
    """The numbers of tokens that a configuration says."""

    stages: tuple[StageSettings, ...]
    tokens_per_step: int
    tokens_per_microbatch: int | None
    total_tokens: int

    def step_of(self, number: int) -> tuple[str, int]:
        """Where a stage's tokens per step were written, and how many they are."""
        own = self.stages[number].tokens_per_step
        return (f"context.stages.{number}.tokens_per_step", own) if own else ("tokens_per_step", self.tokens_per_step)

    def lengths_with(self, step_key: str) -> list[int]:
        """The lengths of rows in all stages whose tokens per step were written there."""
        return [stage.sequence_length for n, stage in enumerate(self.stages) if self.step_of(n)[0] == step_key]

    def changed(self, change: Change) -> "Amounts":
        """The same with one number changed."""
        key, value = change
        if key == "tokens_per_step":
            return replace(self, tokens_per_step=value)
        if key == "tokens_per_microbatch":
            return replace(self, tokens_per_microbatch=value)
        if key == "total_tokens":
            return replace(self, total_tokens=value)
        number, name = key.removeprefix("context.stages.").split(".")
        stages = list(self.stages)
        stages[int(number)] = stages[int(number)].model_copy(update={name: value})
        return replace(self, stages=tuple(stages))


def check_amounts(amounts: Amounts) -> None:
    """Raise ValueError, with values of single keys that would do, where they do not go together."""
    found = _problem(amounts)
    if found is None:
        return
    message, changes = found
    possible = (f"{key}={value}" for key, value in changes if _problem(amounts.changed((key, value))) is None)
    ways = list(islice(possible, 3))
    raise ValueError(f"{message}; try {' or '.join(ways)}" if ways else message)


def _problem(amounts: Amounts) -> tuple[str, Iterable[Change]] | None:
    """The first thing that is wrong, and what might mend it; None: all is well."""
    last = len(amounts.stages) - 1
    until, total = amounts.stages[last].until_tokens, amounts.total_tokens
    if until != total:
        message = f"total_tokens={total} and the last stage's until_tokens={until} must be equal"
        return message, [(f"context.stages.{last}.until_tokens", total), ("total_tokens", until)]
    for number, stage in enumerate(amounts.stages):
        (step_key, step), length = amounts.step_of(number), stage.sequence_length
        if step % length:
            key = f"context.stages.{number}.sequence_length"
            return f"{key}={length} must divide {step_key}={step}", _lengths_and_steps(amounts, number)
    try:
        stages = Stages(amounts.stages, amounts.tokens_per_step)
    except Refusal as refusal:
        return str(refusal), []
    return None if amounts.tokens_per_microbatch is None else _problem_of_microbatches(amounts, stages)


def _problem_of_microbatches(amounts: Amounts, stages: Stages) -> tuple[str, Iterable[Change]] | None:
    tokens = amounts.tokens_per_microbatch
    assert tokens is not None
    for step in stages.first_steps():
        ways = _microbatches_and_steps(amounts, stages, step.stage.index)
        if tokens % step.sequence_length:
            return (
                f"tokens_per_microbatch={tokens} must be a multiple of {step.length_key}={step.sequence_length}",
                ways,
            )
        if step.num_tokens % tokens:
            key = step.stage.step_key
            return f"{key}={step.num_tokens} must be a multiple of tokens_per_microbatch={tokens}", ways
    return None


def _lengths_and_steps(amounts: Amounts, number: int) -> Iterator[Change]:
    """Lengths that a step holds a whole number of, and steps that do so of its lengths."""
    _, step = amounts.step_of(number)
    room = math.gcd(step, amounts.tokens_per_microbatch or step)
    length = amounts.stages[number].sequence_length
    near = nearest_divisors(room, length)
    yield from ((f"context.stages.{number}.sequence_length", value) for value in near if value)
    if room % length == 0:
        yield f"context.stages.{number}.sequence_length", length
    yield from _steps(amounts, number)


def _microbatches_and_steps(amounts: Amounts, stages: Stages, number: int) -> Iterator[Change]:
    """Micro-batches of whole rows of every length of which every step holds a whole number, the nearest first."""
    steps = list(stages.first_steps())
    tokens = amounts.tokens_per_microbatch or 0
    rows, room = math.lcm(*(s.sequence_length for s in steps)), math.gcd(*(s.num_tokens for s in steps))
    if room % rows == 0:
        sizes = sorted((rows * many for many in divisors(room // rows)), key=lambda size: abs(size - tokens))
        yield from (("tokens_per_microbatch", size) for size in sizes[:2])
    yield from _steps(amounts, number)


def _steps(amounts: Amounts, number: int) -> Iterator[Change]:
    """Steps of whole micro-batches and whole rows of every stage that has as many tokens, below and above."""
    step_key, step = amounts.step_of(number)
    unit = math.lcm(*amounts.lengths_with(step_key), amounts.tokens_per_microbatch or 1)
    yield from ((step_key, tokens) for tokens in (step // unit * unit, (step // unit + 1) * unit) if tokens)
