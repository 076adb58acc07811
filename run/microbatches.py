"""The micro-batches of a step: counted, run through the model, and a few rows of them routed once more."""

from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from context.stages import Stage, Stages
from context.step_plan import StepPlan
from data.batches import Batch, Batches
from data.rows import NO_TARGET
from model.loss import LossSums
from model.transformer import Transformer
from moe.balance import Cut
from moe.routing import RoutingStats, TokenFacts
from moe.telemetry import RoutingMeter
from parallel.fsdp import reshard
from parallel.rows import SplitBatch, mask_of
from parallel.sequence import farthest_view
from parallel.vocabulary import cross_entropy
from run.config import rows_of_step
from run.demand import demand_of
from run.plans import tell_plans
from run.start import Run

WATCHED_TOKENS = 1024
"""How many tokens are routed again at a step that is logged, where rows are not longer than that."""


def tell_plan(batches: Batches, stages: Stages, run: Run) -> None:
    """Say what holding rows on several ranks will cost in each stage, for rows like those it begins with."""
    config = run.config

    def first_rows_of(stage: Stage) -> tuple[tuple[int, ...], int]:
        step, num_groups = stage.longest_step(), run.num_groups(stage)
        num_rows = rows_of_step(config, step, num_groups)
        demand = demand_of(step, batches)
        rows = batches.take(demand, 0, num_rows * num_groups, num_rows, rank=0, world_size=num_groups)
        return rows[0].mask_lengths, num_rows

    if run.world.is_main:
        for line in tell_plans(config.model, config.parallel, stages, config.row_ranks, first_rows_of):
            run.say(line)


def take_step(batches: Batches, step: StepPlan, run: Run) -> list[Batch]:
    """Micro-batches of whole rows for this rank's group."""
    groups = run.groups
    num_rows = rows_of_step(run.config, step, groups.size)
    demand = demand_of(step, batches)
    return batches.take(demand, step.first_sample, step.num_samples, num_rows, groups.rank, groups.size)


def split(microbatches: list[Batch], step: StepPlan, run: Run) -> list[Batch]:
    """This rank's part of micro-batches that all ranks of its group have taken."""
    views = [view for view in (farthest_view(run.config.model), step.window) if view is not None]
    return run.row_group.split(microbatches, min(views, default=None))


def count_tokens(microbatches: list[Batch], run: Run) -> Tensor:
    """Target tokens and real tokens of the step, over all micro-batches and ranks: int64 (2,), each at least 1."""
    counts = [sum(batch.num_targets for batch in microbatches), sum(batch.num_real for batch in microbatches)]
    return run.mesh.data.sum(torch.tensor(counts, device=run.device)).clamp(min=1)


def cut_of(microbatches: list[Batch], step: StepPlan, run: Run) -> Cut:
    """How the ranks of the run share the rows of this step."""
    return Cut(
        num_rows=step.num_samples,
        rows_of_microbatches=tuple(len(batch.tokens_BT) for batch in microbatches),
        sequence_length=step.sequence_length,
        sum_over_ranks=run.mesh.data.sum,
        sum_over_shards=run.row_group.sum,
    )


def forward(
    model: Transformer, batch: Batch, run: Run, window: int | None = None
) -> tuple[Tensor, tuple[RoutingStats, ...]]:
    """A micro-batch through the model, in the run's precision: hidden states (B, T, D), routing of each MoE layer.

    window: how many tokens back every layer may see, itself included; left out, what the layer says.
    """
    batch = batch.to(run.device)
    with run.autocast():
        return model(batch.tokens_BT, batch.positions_BT, mask_of(batch).within(window), facts=facts_of(batch))


def loss_of(model: Transformer, hidden_BTD: Tensor, batch: Batch, run: Run) -> LossSums:
    """The head's loss for what `forward` gave, summed over the batch's targets; batch: on the run's device."""
    hidden_ND, labels_N, weights_N = (x.flatten(0, 1) for x in (hidden_BTD, batch.labels_BT, batch.weights_BT))
    chunk, group = run.config.loss_chunk, run.mesh.group("tensor")
    with run.autocast():
        return cross_entropy(hidden_ND, model.head_weight, labels_N, weights_N, chunk, group, model.vocab_size)


def facts_of(batch: Batch) -> TokenFacts:
    """What routers are told of a micro-batch."""
    is_real_BT = None if batch.num_real == batch.num_tokens else batch.is_real_BT
    return TokenFacts(batch.tokens_BT, batch.places_BT, batch.keys_B, is_real_BT)


def watch_choices(  # noqa: PLR0917 (what a step has left in hand)
    routing: RoutingMeter,
    all_stats: tuple[RoutingStats, ...],
    model: Transformer,
    batch: Batch,
    step: StepPlan,
    run: Run,
) -> None:
    """Let the meter tell how many choices for the first rows of `batch`, which gave `all_stats`, the step changed."""
    few = watched_rows(batch, step)

    def again(few: Batch) -> tuple[RoutingStats, ...]:
        _, stats = forward(model, few, run, step.window)
        reshard(model)
        return stats

    if all_stats and few is not None:
        routing.watch(all_stats, few.num_tokens, lambda: again(few), run.row_group.sum)


def watched_rows(batch: Batch, step: StepPlan) -> Batch | None:
    """Whole rows, as some routers choose within a row: one, or more of at most 1024 tokens together, and never more
    than half the step, so that a step of a single row is not watched.
    """
    num_rows = min(WATCHED_TOKENS // step.sequence_length, step.num_samples // 4)
    return first_rows(batch, max(1, num_rows)) if step.num_samples > 1 else None


def first_rows(batch: Batch, num_rows: int) -> Batch:
    """The first rows of a micro-batch, or all of them where there are no more; of a part of one, its part of them."""
    row_length = sum(batch.lengths) // len(batch.tokens_BT)
    tensors: Any = {name: value[:num_rows] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    num_whole = len(tensors["tokens_BT"]) * row_length
    first = replace(
        batch,
        **tensors,
        lengths=tuple(
            length for length, end in zip(batch.lengths, accumulate(batch.lengths), strict=True) if end <= num_whole
        ),
        num_targets=int((tensors["labels_BT"] != NO_TARGET).sum()),
        num_tokens=tensors["tokens_BT"].numel(),
        num_real=int(tensors["is_real_BT"].sum()),
    )
    if isinstance(first, SplitBatch):
        return replace(first, layout=first.layout.first_rows(len(first.tokens_BT)))
    return first
