"""Micro-batches of a run through the parts of its model: forward alone, or both ways as a rehearsal."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attention.mask import Mask
from context.stages import Stage
from context.step_plan import StepPlan
from data.batches import Batch
from model.transformer import Transformer
from moe.routing import RoutingStats, TokenFacts
from parallel.fsdp import reshard
from parallel.pipeline import check_microbatches
from parallel.pipeline_part import Part
from parallel.pipeline_schedule import Pipeline, visiting
from parallel.rows import mask_of
from run.config import RunConfig, rows_of_step
from run.microbatches import facts_of, loss_of
from run.start import Run


def pipeline_of(model: Transformer) -> Pipeline:
    """What `parallel.pipeline.split_layers` left at the model."""
    assert isinstance(model.pipeline, Pipeline), "only where ranks hold the layers one after another"
    return model.pipeline


def check_step(config: RunConfig, step: StepPlan, num_groups: int) -> None:
    """Raise Refusal where the micro-batches of a step cannot pass through the pipeline; num_groups: see `Run`."""
    num_rows, rows_here = rows_of_step(config, step, num_groups), step.num_samples // num_groups
    check_microbatches(config.parallel, rows_here // num_rows, rows_here, step.sequence_length, step.stage.step_key)


def num_to_rehearse(run: Run, step: StepPlan) -> int:
    """How many micro-batches fill the pipeline, so that as many as ever are under way at once on each rank."""
    num_groups = run.num_groups(step.stage)
    num_rows = rows_of_step(run.config, step, num_groups)
    return min(step.num_samples // num_groups // num_rows, 2 * run.mesh.grid.pipeline)


def shape_of(batch: Batch, run: Run) -> tuple[int, int, int]:
    """Of the hidden states between two parts, on this rank: tokens are shared out among those that cut tensors."""
    num_rows, num_tokens = batch.tokens_BT.shape
    return num_rows, num_tokens // run.mesh.grid.tensor, run.config.model.width


def pass_through(
    part: Part, x_BTD: Tensor | None, batch: Batch, run: Run, window: int | None = None
) -> tuple[Tensor, tuple[RoutingStats, ...]]:
    """As `run.microbatches.forward`, of one part; batch: on the run's device. x_BTD: what the part before gave."""
    with run.autocast():
        mask, facts = mask_of(batch).within(window), facts_of(batch)
        return part.through(x_BTD, batch.tokens_BT, batch.positions_BT, mask, facts)


def forward_pass(
    pipeline: Pipeline,
    microbatches: Sequence[Batch],
    run: Run,
    window: int | None,
    tell: Callable[[Part, tuple[RoutingStats, ...], int], None],
) -> None:
    """Micro-batches forward without gradients; `tell` is given each part's own routing. All ranks have to call."""

    def visit(part: Part, x_BTD: Tensor | None, number: int) -> Tensor:
        hidden_BTD, stats = pass_through(part, x_BTD, microbatches[number].to(run.device), run, window)
        tell(part, stats, number)
        return hidden_BTD

    pipeline.forward(visit, len(microbatches), shape_of(microbatches[0], run))
    for part in pipeline.parts:
        reshard(part)


def rehearse(model: Transformer, microbatches: Sequence[Batch], run: Run, window: int | None) -> None:
    """Micro-batches forward and backward by the loss alone, as a trial of memory; gradients are left behind."""

    def visit(part: Part, x_BTD: Tensor | None, number: int) -> Tensor:
        batch = microbatches[number].to(run.device)
        hidden_BTD, _ = pass_through(part, x_BTD, batch, run, window)
        return loss_of(model, hidden_BTD, batch, run).weighted if part.is_last else hidden_BTD

    pipeline_of(model).both_ways(visit, len(microbatches), shape_of(microbatches[0], run))


@torch.no_grad()
def try_parts(model: Transformer, stage: Stage, run: Run) -> None:
    """One token, or one for each rank that shares tokens out, through each part by itself: what no backend can do is
    refused. Ranks of other parts are not waited for.
    """
    model.use_rotary(stage.rotary)
    tokens_BT = torch.zeros(1, run.mesh.grid.tensor, dtype=torch.int64, device=run.device)
    places_BT = torch.arange(tokens_BT.shape[1], device=run.device).expand_as(tokens_BT)
    facts = TokenFacts(tokens_BT, places_BT)

    def visit(part: Part, x_BTD: Tensor | None, number: int) -> Tensor:
        with run.autocast():
            return part.through(x_BTD, tokens_BT, places_BT, Mask(), facts)[0].sum()

    parts = pipeline_of(model).parts
    with visiting(parts, visit):
        for part in parts:
            x_BTD = None if part.is_first else torch.zeros(1, 1, run.config.model.width, device=run.device)
            part(x_BTD, number=torch.zeros(1, dtype=torch.int64))
