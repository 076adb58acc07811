"""One optimizer step where ranks hold the layers one after another: the same contract as `train.train_step`."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from context.step_plan import StepPlan
from data.batches import Batch
from model.transformer import Transformer
from moe.balance import StepBalance
from moe.router import Router
from moe.routing import RoutingStats
from moe.telemetry import RoutingMeter
from optim.groups import Optimizer
from parallel.pipeline_part import Part, attach
from parallel.pipeline_schedule import Pipeline
from run.microbatches import count_tokens, cut_of, loss_of, watched_rows
from run.pipeline_pass import forward_pass, pass_through, pipeline_of, shape_of
from run.record import StepReport
from run.start import Run
from run.update import ranks_of_pipeline, update


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

    def own(counts_LE: Tensor) -> Tensor:
        return torch.cat([counts_LE[part.moe_layers] for part in pipeline.parts])

    rules = balances[pipeline.parts[0]].rules
    loss, gradient_norm = update(
        model, optimizer, routing, run, nats=nats, num_targets=num_targets, rules=rules, own=own
    )
    routers = [module for module in model.modules() if isinstance(module, Router)]
    tell_biases(routing, routers, pipeline, run)
    watch(routing, [stats for part in pipeline.parts for stats in first[part]], model, microbatches[0], step, run)
    return StepReport(loss, gradient_norm, routing, microbatches)


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


def tell_biases(routing: RoutingMeter, routers: Sequence[Router], pipeline: Pipeline, run: Run) -> None:
    """Let the meter tell of the selection biases of all ranks."""
    moe = run.config.model.moe
    if routing.counts_LE is None or moe is None or not moe.has_bias:
        return
    own = [router.bias_E for router in routers if router.bias_E is not None]
    own_lE = (
        torch.stack(own) if own else routing.counts_LE.new_zeros(0, routing.counts_LE.shape[1], dtype=torch.float32)
    )
    routing.routers = [ToldBias(bias_E) for bias_E in spread(own_lE, pipeline, run)]


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

    def over_all(sums_l2: Tensor) -> Tensor:
        return spread(run.row_group.sum(sums_l2), pipeline, run)

    routing.watch(all_stats, few.num_tokens, route_again, over_all)


def spread(own_lX: Tensor, pipeline: Pipeline, run: Run) -> Tensor:
    """Of rows of the MoE layers here (l, X) those of all layers (L, X), on every rank of the pipeline."""
    whole_LX = own_lX.new_zeros(num_moe_layers(run), own_lX.shape[1])
    taken = 0
    for part in pipeline.parts:
        rows = whole_LX[part.moe_layers]
        rows.copy_(own_lX[taken : taken + len(rows)])
        taken += len(rows)
    return ranks_of_pipeline(run).sum(whole_LX)
