"""How long a step takes on one rank: arithmetic on settings, the grid, and a device's speeds."""

from collections.abc import Iterable

from model.size import attention_flops_per_token, multiplied_weights
from parallel.pipeline_part import layers_of
from planning.device import Device
from planning.speeds import OURS, Framework
from planning.step_parts import Job, Part, Stage, StepTime, merge
from planning.timer import Timer

SCHEDULES: dict[str, float] = {"1f1b": 1.0, "interleaved": 1.0, "zero_bubble": 1 / 3}
"""Of a micro-batch's time, how much each further rank leaves one waiting (the last: Qi et al. 2023, table 1)."""


def step_time(job: Job, device: Device, framework: Framework = OURS) -> StepTime:
    """How long one step takes; the ranks of a pipeline wait for the slowest of them."""
    timer = Timer(job, device, framework)
    stages = [timer.microbatch(stage) for stage in _stages(job)]
    slowest = max(stages, key=_exposed)
    merged = merge([part.times(job.microbatches) for part in slowest])
    waiting = SCHEDULES[job.schedule] * (job.grid.pipeline - 1) / job.parts * _exposed(slowest)
    parts = [*merged, *timer.once(slowest), Part("waiting in the pipeline", waiting)]
    tokens = job.tokens * job.microbatches * job.grid.data / job.grid.size
    return StepTime(tuple(p for p in parts if p.seconds), tokens, tokens * flops_of_token(job), device.peak)


def flops_of_token(job: Job) -> float:
    """The model's operations for a token, forward and backward."""
    weights = multiplied_weights(job.model, job.vocab_size)
    return 6 * weights + attention_flops_per_token(job.model, job.lengths, job.window)


def _stages(job: Job) -> list[Stage]:
    """For each place along the pipeline."""
    ranks, parts = job.grid.pipeline, job.grid.pipeline * job.parts
    layers = [
        tuple(layer for part in range(place, parts, ranks) for layer in layers_of(part, parts, job.model.num_layers))
        for place in range(ranks)
    ]
    return [Stage(own, place == 0, place == ranks - 1) for place, own in enumerate(layers)]


def _exposed(parts: Iterable[Part]) -> float:
    return sum(part.exposed for part in parts)
