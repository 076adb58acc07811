"""What it will cost to hold rows on several ranks, told before a run starts: the work, its balance and what is sent."""

from collections.abc import Callable, Iterable, Iterator

from attention.mask import Documents
from context.plan import plan
from context.stages import Stage
from context.ulysses import largest_group
from context.volume import summary
from model.transformer import ModelSettings
from parallel.mesh import ParallelSettings
from parallel.rows import lay_out
from parallel.sequence import farthest_view, heads_of

Rows = tuple[tuple[int, ...], int]
"""The documents of a micro-batch, row by row, and how many rows they fill."""


def tell_plans(
    model: ModelSettings,
    parallel: ParallelSettings,
    stages: Iterable[Stage],
    row_ranks: Callable[[Stage], int],
    rows_of: Callable[[Stage], Rows],
) -> Iterator[str]:
    """A few lines for each stage and kind of layer, for rows that are like those that `rows_of` gives.

    row_ranks: how many ranks hold each row together in a stage. Nothing of stages in which every rank holds whole rows.
    """
    heads, view = heads_of(model), farthest_view(model)
    methods = {"full": parallel.sequence.full, "window": parallel.sequence.window}
    windows = {"full": None, "window": model.attention.window}
    kinds = {model.layer_kind(layer).removesuffix("_nope") for layer in range(model.num_layers)}
    for stage in (stage for stage in stages if row_ranks(stage) > 1):
        layout, lengths = lay_out(*rows_of(stage), parallel.sequence, row_ranks(stage), view)
        for kind in sorted(kinds):
            yield f"stage {stage.index}, {kind} layers by {methods[kind]}, layout {parallel.sequence.layout}:"
            made = plan(layout, Documents(lengths), windows[kind])
            inside = largest_group(heads.num_heads, heads.num_kv_heads, row_ranks(stage), parallel.sequence.ulysses)
            told = summary(made, heads, inside if methods[kind] == "usp" else None)
            yield from (f"  {line}" for line in told.splitlines())


def whole_documents(stage: Stage) -> Rows:
    """One row of one document: the most work and the most bytes that a row can need."""
    return (stage.sequence_length,), 1
