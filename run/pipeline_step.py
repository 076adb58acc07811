"""One optimizer step where ranks hold the layers one after another: the same contract as `train.train_step`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from context.step_plan import StepPlan
from data.batches import Batch
from model.transformer import Transformer
from moe.balance import StepBalance, update_biases
from moe.router import Router
from moe.routing import RoutingStats
from moe.telemetry import RoutingMeter
from optim.groups import Optimizer
from parallel.gradients import clip_gradients, named_parameters, norm_over_ranks, sum_gradients
from parallel.pipeline_part import Part, attach
from parallel.pipeline_schedule import Pipeline
from parallel.world import World
from run.microbatches import count_tokens, cut_of, loss_of, watched_rows
from run.pipeline_pass import forward_pass, pass_through, pipeline_of, shape_of
from run.record import StepReport
from run.start import Run


def pipeline_step(
    model: Transformer, optimizer: Optimizer, microbatches: list[Batch], step: StepPlan, run: Run
) -> StepReport:
    """The loss is the sum over all target tokens of all ranks, divided by their number; the same on every rank."""
    model.train()
    optimizer.zero_grad()
    pipeline = pipeline_of(model)
    num_targets, num_real = count_tokens(microbatches, run)
    balances = count_ahead(pipeline, microbatches, step, run, num_real)
    routing, nats = empty_meter(run), torch.zeros((), device=run.device)
    first: dict[Part, tuple[RoutingStats, ...]] = {}

    def visit(part: Part, x_BTD: Tensor | None, number: int) -> Tensor:
        batch = microbatches[number].to(run.device)
        hidden_BTD, stats = pass_through(part, x_BTD, batch, run, step.window)
        routing.add(stats, part.moe_layers)
        first.setdefault(part, stats)
        objective = balances[part].objective(stats, batch.rows_B) / run.mesh.grid.tensor
        if not part.is_last:
            return attach(hidden_BTD, objective)
        sums = loss_of(model, hidden_BTD, batch, run)
        nats.add_(sums.plain)
        return sums.weighted / num_targets + objective

    pipeline.both_ways(visit, len(microbatches), shape_of(microbatches[0], run))
    parameters, ranks = named_parameters(model), ranks_of_pipeline(run)
    sum_gradients(parameters, run.layouts, run.mesh)
    for tensor in (nats, *routing.tensors()):
        ranks.sum(run.mesh.data.sum(tensor))
    gradient_norm = norm_over_ranks(parameters, run.layouts, run.mesh)
    clip_gradients(optimizer.parameters, gradient_norm, optimizer.clip)
    optimizer.step()
    move_biases(pipeline, routing, balances, ranks)
    watch(routing, [stats for part in pipeline.parts for stats in first[part]], model, microbatches[0], step, run)
    return StepReport(nats / num_targets, gradient_norm, routing, microbatches)


def ranks_of_pipeline(run: Run) -> World:
    """The ranks that hold the layers one after another, this one among them."""
    grid, rank = run.mesh.grid, run.world.rank
    return World(grid.place("pipeline", rank), grid.pipeline, run.world.local_rank, run.mesh.group("pipeline"))


def count_ahead(
    pipeline: Pipeline, microbatches: list[Batch], step: StepPlan, run: Run, num_real: Tensor
) -> dict[Part, StepBalance]:
    """The balance losses of the layers of each part, with the counts of the whole step where they need them.

    Several micro-batches are under way at once, so all of them are counted before the first.
    """
    moe = run.config.model.moe
    cut = replace(cut_of(microbatches, step, run), num_layers=num_moe_layers(run))
    balances = {part: StepBalance(moe, cut, num_real) for part in pipeline.parts}
    if balances[pipeline.parts[0]].needs_counts:

        def count(part: Part, stats: Sequence[RoutingStats], number: int) -> None:
            balances[part].count(stats, microbatches[number].rows_B.to(run.device))

        forward_pass(pipeline, microbatches, run, step.window, count)
    for balance in balances.values():
        balance.complete()
    return balances


def num_moe_layers(run: Run) -> int:
    """Of the whole model."""
    model = run.config.model
    return 0 if model.moe is None else model.num_layers - model.num_dense_layers


def empty_meter(run: Run) -> RoutingMeter:
    """With room for the layers of all ranks; each rank of the run but its copies writes its largest logit apart."""
    data, ranks, moe = run.mesh.data, ranks_of_pipeline(run), run.config.model.moe
    meter = RoutingMeter((), ranks.rank * data.size + data.rank, ranks.size * data.size)
    if moe is not None and num_moe_layers(run):
        num_null = moe.null_experts.count if moe.null_experts else 0
        meter.expect(num_moe_layers(run), moe.num_experts, num_null, run.device)
    return meter


class ToldBias:
    """The selection bias of a layer that may be another rank's."""

    def __init__(self, bias_E: Tensor) -> None:
        self.bias_E = bias_E


def move_biases(pipeline: Pipeline, routing: RoutingMeter, balances: dict[Part, StepBalance], ranks: World) -> None:
    """Move the selection biases of the layers that are here, and let the meter tell of all ranks'."""
    rules = balances[pipeline.parts[0]].rules
    if routing.counts_LE is None or all(rule.kind != "bias" for rule in rules):
        return
    told_LE = torch.zeros_like(routing.counts_LE, dtype=torch.float32)
    for part in pipeline.parts:
        routers = [module for module in part.modules() if isinstance(module, Router)]
        update_biases(routers, routing.counts_LE[part.moe_layers], rules)
        for bias_E, router in zip(told_LE[part.moe_layers], routers, strict=True):
            assert router.bias_E is not None
            bias_E.copy_(router.bias_E)
    routing.routers = [ToldBias(bias_E) for bias_E in ranks.sum(told_LE)]


def watch(  # noqa: PLR0917 (what a step has left in hand)
    routing: RoutingMeter,
    all_stats: Sequence[RoutingStats],
    model: Transformer,
    batch: Batch,
    step: StepPlan,
    run: Run,
) -> None:
    """As `watch_choices`, over the layers of all ranks: all of them have to ask for the report."""
    few, pipeline = watched_rows(batch, step), pipeline_of(model)
    if few is None or routing.counts_LE is None:
        return

    def route_again() -> list[RoutingStats]:
        again: dict[Part, Sequence[RoutingStats]] = {}
        forward_pass(pipeline, [few], run, step.window, lambda part, stats, _: again.update({part: stats}))
        return [stats for part in pipeline.parts for stats in again[part]]

    routing.watch(all_stats, few.num_tokens, route_again, whole_table(pipeline, run))


def whole_table(pipeline: Pipeline, run: Run) -> Callable[[Tensor], Tensor]:
    """Makes of rows of the MoE layers here (l, X) those of all layers (L, X), summed over ranks with parts of a row."""

    def spread(own_lX: Tensor) -> Tensor:
        whole_LX = own_lX.new_zeros(num_moe_layers(run), own_lX.shape[1])
        taken = 0
        for part in pipeline.parts:
            rows = whole_LX[part.moe_layers]
            rows.copy_(own_lX[taken : taken + len(rows)])
            taken += len(rows)
        return ranks_of_pipeline(run).sum(run.row_group.sum(whole_LX))

    return spread
