"""What a step of a stage asks of the data."""

from dataclasses import replace

from context.shares import shares_of_tokens
from context.step_plan import StepPlan
from data.batches import Batches
from data.demand import Demand
from settings import Refusal


def demand_of(step: StepPlan, batches: Batches) -> Demand:
    """Rows as the step's stage wants them, of the step's length. Raises Refusal for a mixture that means nothing."""
    settings = step.stage.settings
    # The key that says sequence_length has the stage's own, not that of a growth's shorter rows.
    is_own = step.sequence_length == step.stage.sequence_length
    where = step.stage.key if is_own else f"{step.stage.key}.growth, rows of {step.sequence_length} tokens"
    demand = Demand(
        stage_index=step.stage.index,
        sequence_length=step.sequence_length,
        mixture=settings.mixture,
        buckets=settings.buckets,
        pack=settings.pack,
        has_document_mask=settings.has_document_mask,
        positions=settings.positions,
        where=f"{where}: ",
        stage_length=step.stage.sequence_length,
        longest_length=step.stage.lengths.longest,
    )
    if settings.mixture_unit == "tokens":
        return demand
    try:
        return replace(demand, mixture=shares_of_tokens(settings.mixture, batches.mean_document_lengths(demand)))
    except ValueError as error:
        raise Refusal(f"{demand.where}{error}") from None
