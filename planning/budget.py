"""What to train for a number of FLOPs, or of hours: size, tokens and batch, as laws that others fitted say."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from context.lengths import divisors
from model.size import Size, attention_flops_per_token, count, multiplied_weights
from parallel.mesh import grid_of
from planning.device import Device
from planning.jobs import framework_of, job_of
from planning.resize import resized
from planning.step_time import step_time
from run.config import RunConfig
from run.needs import kind_of
from run.scale import COUNTS, changed_at
from scaling.repeats import worth
from scaling.runs import FLOPS_PER_PARAMETER
from scaling.sets import CoefficientSet, advise, step_law_batch
from settings import to_dict, validate

FITTED_FLOPS = (1.4e18, 1.3e22)
"""Of the runs that all named sets were fitted to: Hoffmann et al. 2022, figure 4."""
STEP_LAW_SIZES = (6e7, 1e9)
"""Parameters of the runs that Li et al. 2025 fitted batch and rate to."""
NEAR = 0.01
"""How near to the hours that are asked for a budget has to come."""
MOST_TRIES = 12


@dataclass(frozen=True)
class Budget:
    """What a law says to train."""

    flops: float
    """6ND."""
    parameters: float
    """That a token meets."""
    tokens: float
    """Seen, all passes together."""
    loss: float
    """Nats a token, by the law."""
    unique: float | None = None
    """Tokens that there are; None: as many as are wanted."""

    @property
    def epochs(self) -> float:
        return 1.0 if self.unique is None else max(1.0, self.tokens / self.unique)

    @property
    def batch_tokens(self) -> float:
        return step_law_batch(self.tokens)


def budget_of(flops: float, coefficients: CoefficientSet, unique: float | None = None) -> Budget:
    """Size and tokens of least loss. unique: so many tokens there are, and further passes over them are worth less
    (Muennighoff et al. 2023), so that more of the budget goes into the model."""
    told = advise(flops, coefficients)
    if unique is None or told.tokens <= unique:
        return Budget(flops, told.parameters, told.tokens, told.loss, unique)
    sizes_S = told.parameters * np.exp(np.linspace(-0.1, math.log(100), 20_001))
    tokens_S = flops / (FLOPS_PER_PARAMETER * sizes_S)
    losses = [
        coefficients.loss(size, worth(unique, tokens / unique)) for size, tokens in zip(sizes_S, tokens_S, strict=True)
    ]
    best = int(np.argmin(losses))
    return Budget(flops, float(sizes_S[best]), float(tokens_S[best]), losses[best], unique)


@dataclass(frozen=True)
class Sized:
    """A budget as a run after the pattern of a configuration."""

    budget: Budget
    config: RunConfig
    size: Size
    seconds: float
    """Predicted, on the ranks that are planned for."""
    flops: float
    """The model's own operations, attention included."""


def sized(config: RunConfig, vocab_size: int, budget: Budget, num_ranks: int, device: Device) -> Sized:
    """The configuration resized to a budget, and what it takes."""
    model = resized(config.model, vocab_size, budget.parameters)
    grid, stages = grid_of(config.parallel, num_ranks), list(config.stages)
    groups = math.lcm(*(grid.data // config.row_ranks(stage) for stage in stages))
    unit = groups * math.lcm(*(stage.sequence_length for stage in stages))
    often = max(1, round(budget.batch_tokens / unit))
    table = to_dict(config) | {"model": to_dict(model), "tokens_per_step": often * unit}
    rows = often * unit // groups
    largest = max(stage.sequence_length for stage in stages)
    most = min(config.tokens_per_microbatch or rows, rows // config.parallel.pipeline)
    table["tokens_per_microbatch"] = max(
        (d * largest for d in divisors(rows // largest) if d * largest <= most), default=largest
    )
    given = validate(with_tokens(table, budget.tokens, often * unit), RunConfig, "the resized run")
    size, seconds, flops = count(model, vocab_size), 0.0, 0.0
    for stage in given.stages:
        step = stage.longest_step()
        lengths = (step.sequence_length,)
        job = job_of(given, vocab_size, step, grid, lengths, (kind_of(given),) * model.num_layers)
        seconds += stage.num_steps * step_time(job, device, framework_of(given, device)).seconds
        a_token = 6 * multiplied_weights(model, vocab_size) + attention_flops_per_token(model, lengths, step.window)
        flops += stage.num_tokens * a_token
    return Sized(budget, given, size, seconds, flops)


def with_tokens(table: dict[str, Any], tokens: float, per_step: int) -> dict[str, Any]:
    """The table of a run with so many tokens: whatever counts them in proportion, stages in whole steps."""
    by = tokens / table["total_tokens"]
    scaled: Any = table
    for path in COUNTS:
        scaled = changed_at(scaled, path.split("."), lambda value, _: max(1, round(value * by)) if value else value)
    steps = 0
    for stage in scaled["context"]["stages"]:
        stage.pop("tokens_per_step", None)
        steps = max(steps + 1, round(stage["until_tokens"] / per_step))
        stage["until_tokens"] = steps * per_step
    return dict(scaled | {"total_tokens": steps * per_step})


def for_hours(seconds: float, first: float, seconds_of: Callable[[float], float]) -> float:
    """The FLOPs that take so many seconds; the nearest that were met, where sizes go in steps too coarse to come near.

    seconds_of: FLOPs to seconds, about in proportion. first: where to begin.
    """
    flops, tried = first, []
    for _ in range(MOST_TRIES):
        took = seconds_of(flops)
        tried.append((abs(math.log(took / seconds)), flops))
        if abs(took / seconds - 1) <= NEAR:
            break
        flops *= seconds / took
    return min(tried)[1]
