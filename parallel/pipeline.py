"""Pipeline parallelism: ranks hold the layers one after another, and micro-batches go from rank to rank.

The layers are cut into parts in a row, and the ranks take the parts in turn: of 4 parts on 2 ranks, the first rank has
parts 0 and 2. What goes from part to part is the hidden state alone; everything else that a layer is told of its tokens
each rank has itself, for all ranks of a pipeline take the same micro-batches.
"""

from dataclasses import replace

from torch import nn

from model.transformer import MOST_LAYERS, ModelSettings, Transformer
from parallel.later import Later, leave_weights
from parallel.layout import Layout
from parallel.mesh import Mesh, ParallelSettings, PipeliningSettings, divisors
from parallel.pipeline_part import Elsewhere, Part, layers_of
from parallel.pipeline_schedule import Pipeline
from settings import Refusal


def parts_per_rank(settings: PipeliningSettings) -> int:
    """How many parts of the model a rank has."""
    return 1 if settings.schedule == "1f1b" else settings.parts_per_rank


def stage_of(name: str, ranks: int, parts: int, num_layers: int) -> int:
    """Which rank of a pipeline has a parameter or buffer of the whole model."""
    first, *rest = name.split(".")
    if first == "blocks":
        part = next(part for part in range(parts) if int(rest[0]) in layers_of(part, parts, num_layers))
    else:
        part = {"embedding": 0, "norm": parts - 1, "head": parts - 1}[first]
    return part % ranks


def check_pipeline(
    settings: ParallelSettings, model: ModelSettings, tokens_per_microbatch: int | None, *, compile: bool
) -> None:
    """Raise ValueError where this model cannot be cut into so many parts, or not be passed through as is wanted."""
    if settings.pipeline == 1:
        return
    if tokens_per_microbatch is None:
        raise ValueError(
            f"parallel.pipeline={settings.pipeline} passes a step on in {settings.pipeline} micro-batches or more, and"
            " tokens_per_microbatch is left out, which makes one; set tokens_per_microbatch"
        )
    if compile and settings.pipelining.schedule == "zero_bubble":
        raise ValueError(
            "compile=true makes the gradients of inputs and weights in one, and"
            ' parallel.pipelining.schedule="zero_bubble" makes them apart; set compile=false, or the schedule to'
            ' "interleaved"'
        )
    per_rank, layers = parts_per_rank(settings.pipelining), model.num_layers
    parts = settings.pipeline * per_rank
    if model.tied_embeddings:
        raise ValueError(
            f"model.tied_embeddings=true needs the embedding on the first rank and on the last, and"
            f" parallel.pipeline={settings.pipeline} holds each parameter once; set model.tied_embeddings=false or"
            " parallel.pipeline=1"
        )
    if parts > layers:
        told = f" with parallel.pipelining.parts_per_rank={per_rank}" if per_rank > 1 else ""
        ways = {
            "parallel.pipeline": layers // per_rank,
            "parallel.pipelining.parts_per_rank": layers // settings.pipeline if per_rank > 1 else 0,
            "model.num_layers": parts if parts <= MOST_LAYERS else 0,
        }
        raise ValueError(
            f"parallel.pipeline={settings.pipeline}{told} makes {parts} parts of model.num_layers={layers}, and each"
            f" needs a layer; try {' or '.join(f'{key}={value}' for key, value in ways.items() if value)}"
        )


def check_microbatches(
    settings: ParallelSettings, num_microbatches: int, num_rows: int, sequence_length: int, key: str
) -> None:
    """Raise Refusal where the schedule cannot do with so many micro-batches of a step.

    num_rows: of the step; both on each rank, or group of ranks that hold rows together. key: of the tokens of a step.
    """
    why = _why_not(settings, num_microbatches)
    if why is None:
        return
    fits = [count for count in divisors(num_rows) if _why_not(settings, count) is None]
    near = min(fits, key=lambda count: (abs(count - num_microbatches), count), default=None)
    way = (
        f"tokens_per_microbatch={num_rows // near * sequence_length}, which makes {near}, or another {key}"
        if near
        else f"{key} of {settings.pipeline} rows of {sequence_length} tokens, or more, on each"
    )
    raise Refusal(
        f"parallel.pipeline={settings.pipeline}: {key} comes in {num_microbatches} micro-batches on each rank, and"
        f" {why}; try {way}"
    )


def _why_not(settings: ParallelSettings, num_microbatches: int) -> str | None:
    ranks, schedule = settings.pipeline, settings.pipelining.schedule
    if ranks == 1:
        return None
    if num_microbatches < ranks:
        return f"a pipeline of {ranks} ranks needs {ranks} or more"
    rounds = num_microbatches // ranks
    if schedule != "1f1b" and num_microbatches % rounds:
        return f'parallel.pipelining.schedule="{schedule}" takes them in {rounds} rounds of the same size'
    return None


def split_layers(model: Transformer, mesh: Mesh, settings: PipeliningSettings, layouts: dict[str, Layout]) -> None:
    """Leave on this rank its parts of a model on the meta device, in `model.pipeline`, and say whose all others are.

    What says how single layers are cut has to come before it, for every rank has to know how those of others are.
    """
    group = mesh.group("pipeline")
    if group is None:
        return
    ranks, here = mesh.grid.pipeline, mesh.grid.place("pipeline", mesh.world.rank)
    parts = ranks * parts_per_rank(settings)
    for name, layout in layouts.items():
        layouts[name] = replace(layout, stage=stage_of(name, ranks, parts, model.settings.num_layers))
    mine = [Part(model, index, parts) for index in range(here, parts, ranks)]
    kept = {layer for part in mine for layer in part.layers}
    for layer in set(range(len(model.blocks))) - kept:
        model.blocks[layer] = Elsewhere()
    ends = ([] if mine[0].is_first else ["embedding"]) + ([] if mine[-1].is_last else ["norm", "head"])
    for name in ends:
        setattr(model, name, Elsewhere())
    if settings.schedule == "zero_bubble":
        for part in mine:
            part.later = Later()
            leave_weights(part.blocks, part.later)
    model.pipeline = Pipeline(mine, parts, group, settings.schedule)


def roots_of(model: Transformer) -> tuple[nn.Module, ...]:
    """What a micro-batch comes to: the model, or this rank's parts of it."""
    return model.pipeline.parts if isinstance(model.pipeline, Pipeline) else (model,)
