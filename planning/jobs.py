"""What a configuration gives the ranks to do in a step, in the terms that time is added up in."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from attention.mask import Documents
from context.plan import plan
from context.step_plan import StepPlan
from context.ulysses import largest_group
from context.volume import Volume, volume
from model.block import Kind
from model.transformer import ModelSettings
from moe.balance import rows_per_group
from parallel.mesh import Grid, SequenceSettings
from parallel.rows import lay_out
from parallel.sequence import farthest_view, heads_of
from planning.device import Device
from planning.speeds import OURS, Framework, mean_of
from planning.step_parts import Job
from run.config import RunConfig, rows_of_step
from run.needs import microbatches_of, parts_per_rank

KERNELS = {"cudnn": "flash3", "flex": "flex"}
"""Of attention's backends, the kernels that speeds are known of; of all others flash-attention 2's are taken."""


def job_of(  # noqa: PLR0917 (a step, and all that it depends on)
    config: RunConfig, vocab_size: int, step: StepPlan, grid: Grid, lengths: tuple[int, ...], kinds: tuple[Kind, ...]
) -> Job:
    """Of a step like this one; lengths: of the documents that attention stays inside of; kinds: of every layer."""
    row_ranks = config.row_ranks(step.stage)
    num_rows = rows_of_step(config, step, grid.data // row_ranks)
    pipelining = config.parallel.pipelining
    return Job(
        model=config.model,
        vocab_size=vocab_size,
        grid=grid,
        tokens=num_rows * step.sequence_length // row_ranks,
        microbatches=microbatches_of(config, step, grid),
        lengths=lengths,
        window=step.window,
        repeats=mean_of(kinds),
        schedule=pipelining.schedule if grid.pipeline > 1 else "1f1b",
        parts=parts_per_rank(config),
        counts_first=counts_first(config, step, num_rows),
        context=row_ranks,
        volumes=volumes(config, step, num_rows) if row_ranks > 1 else {},
    )


def framework_of(config: RunConfig, device: Device) -> Framework:
    """How this project computes and sends under a configuration."""
    kernel, c = KERNELS.get(config.model.attention.backend, OURS.attention), device.dtype.itemsize
    return replace(OURS, attention=kernel, is_fused=config.compile, gathered=c, tensor_out=c)


def counts_first(config: RunConfig, step: StepPlan, num_rows: int) -> bool:
    """Whether some balance loss is over rows of several micro-batches, which are then counted before: `StepBalance`."""
    losses = [rule for rule in config.model.moe.balance if rule.kind == "loss"] if config.model.moe else []
    sizes = [rows_per_group(loss, step.num_samples, step.sequence_length) for loss in losses if loss.coefficient]
    return any(num_rows % size for size in sizes)


def volumes(config: RunConfig, step: StepPlan, num_rows: int) -> Mapping[str, Volume]:
    """The most that a rank sends in a layer of each kind, if every row of a micro-batch is one document."""
    return _volumes(
        config.model, config.parallel.sequence, config.row_ranks(step.stage), step.sequence_length, num_rows
    )


@lru_cache(maxsize=512)
def _volumes(
    model: ModelSettings, sequence: SequenceSettings, size: int, length: int, num_rows: int
) -> Mapping[str, Volume]:
    """As above, once for each: a search asks for them again and again."""
    heads, rows = heads_of(model), ((length,) * num_rows, num_rows)
    layout, lengths = lay_out(*rows, sequence, size, farthest_view(model))
    sent: dict[str, Volume] = {}
    for view in sorted({model.view(layer) for layer in range(model.num_layers)}):
        method = getattr(sequence, view)
        made = plan(layout, Documents(lengths), model.attention.window if view == "window" else None)
        inside = largest_group(heads.num_heads, heads.num_kv_heads, size, sequence.ulysses) if method == "usp" else 1
        every = [volume(made, heads, method, rank, size_inside=inside) for rank in range(size)]
        sent[view] = Volume(max(v.forward for v in every), max(v.backward for v in every))
    return sent
