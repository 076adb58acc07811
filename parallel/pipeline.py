"""Pipeline parallelism: ranks hold the layers one after another, and micro-batches go from rank to rank.

The layers are cut into parts in a row, and the ranks take the parts in turn: of 4 parts on 2 ranks, the first rank has
parts 0 and 2. What goes from part to part is the hidden state alone; everything else that a layer is told of its tokens
each rank has itself, for all ranks of a pipeline take the same micro-batches.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from attention.mask import Mask
from model.transformer import ModelSettings, Transformer
from moe.routing import RoutingStats, TokenFacts
from parallel.layout import Layout
from parallel.mesh import Mesh, ParallelSettings, divisors
from parallel.pipeline_schedule import Pipeline
from settings import Refusal


def num_parts(settings: ParallelSettings) -> int:
    """Of the model, on all ranks of a pipeline together."""
    per_rank = 1 if settings.pipelining.schedule == "1f1b" else settings.pipelining.parts_per_rank
    return settings.pipeline * per_rank


def layers_of(part: int, parts: int, num_layers: int) -> range:
    """Which layers a part has: as many as the others, or one more in the first ones, as the last has the head."""
    few, more = divmod(num_layers, parts)
    start = part * few + min(part, more)
    return range(start, start + few + (part < more))


def stage_of(name: str, settings: ParallelSettings, num_layers: int) -> int | None:
    """Which rank of a pipeline has a parameter or buffer of the whole model; None: there is no pipeline."""
    if settings.pipeline == 1:
        return None
    parts, (first, *rest) = num_parts(settings), name.split(".")
    if first == "blocks":
        part = next(part for part in range(parts) if int(rest[0]) in layers_of(part, parts, num_layers))
    else:
        part = {"embedding": 0, "norm": parts - 1, "head": parts - 1}[first]
    return part % settings.pipeline


def check_pipeline(settings: ParallelSettings, model: ModelSettings) -> None:
    """Raise ValueError where this model cannot be cut into so many parts."""
    if settings.pipeline == 1:
        return
    parts, layers = num_parts(settings), model.num_layers
    if model.tied_embeddings:
        raise ValueError(
            f"model.tied_embeddings=true needs the embedding on the first rank and on the last, and"
            f" parallel.pipeline={settings.pipeline} holds each parameter once; set model.tied_embeddings=false or"
            " parallel.pipeline=1"
        )
    if parts > layers:
        per_rank = parts // settings.pipeline
        told = f" with parallel.pipelining.parts_per_rank={per_rank}" if per_rank > 1 else ""
        ways = [f"parallel.pipeline={layers // per_rank}"] if layers >= 2 * per_rank else []
        ways += [f"parallel.pipelining.parts_per_rank={layers // settings.pipeline}"] if per_rank > 1 else []
        ways += [f"model.num_layers={parts}"]
        raise ValueError(
            f"parallel.pipeline={settings.pipeline}{told} makes {parts} parts of model.num_layers={layers}, and each"
            f" needs a layer; try {' or '.join(way for way in ways if not way.endswith('=0'))}"
        )


def check_microbatches(settings: ParallelSettings, num_microbatches: int, tokens: int, key: str) -> None:
    """Raise Refusal where the schedule cannot do with so many micro-batches of a step on each rank.

    tokens: of a step on each rank, or group of ranks that hold rows together. key: of the tokens of a step.
    """
    ranks, schedule = settings.pipeline, settings.pipelining.schedule
    if ranks == 1:
        return
    if num_microbatches < ranks:
        fewest, why = ranks, f"a pipeline of {ranks} ranks needs {ranks} or more"
    elif schedule != "1f1b" and num_microbatches % (num_microbatches // ranks):
        # Rounds of as many micro-batches as there are ranks, or a few more; all rounds of the same size.
        fewest = max(count for count in range(ranks, num_microbatches) if count % (count // ranks) == 0)
        rounds = num_microbatches // ranks
        why = f'parallel.pipelining.schedule="{schedule}" takes them in {rounds} rounds of the same size'
    else:
        return
    fits = [count for count in divisors(tokens) if count >= ranks and (schedule == "1f1b" or count % (count // ranks) == 0)]
    near = min(fits, key=lambda count: (abs(count - fewest), count), default=fewest)
    raise Refusal(
        f"parallel.pipeline={ranks}: {key} comes in {num_microbatches} micro-batches on each rank, and {why}; try"
        f" tokens_per_microbatch={max(tokens // near, 1)}, which makes {near}, or another {key}"
    )


class Elsewhere(nn.Module):
    """Stands where a layer would be that another rank has, so that layers keep their numbers."""


class Part(nn.Module):
    """Some layers in a row, the first of all parts with the embedding and the last with norm and head.

    Its modules are the model's own, under the names that they have there.
    """

    def __init__(self, model: Transformer, index: int, parts: int) -> None:
        super().__init__()
        self.index, self.is_first, self.is_last = index, index == 0, index == parts - 1
        self.layers = layers_of(index, parts, model.settings.num_layers)
        # Not registered: a part is no parent of the model, which has other parts too.
        object.__setattr__(self, "model", model)
        self.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in self.layers})
        if self.is_first:
            self.embedding = model.embedding
        if self.is_last:
            self.norm, self.head = model.norm, model.head
        self.visit: Callable[[Part, Tensor | None, int], Tensor] | None = None
        """What is done when a micro-batch comes: (this part, its hidden states or None, its number) to what goes on."""

    @property
    def moe_layers(self) -> slice:
        """Which MoE layers of the model, counted from its first, are here."""
        dense = self.model.settings.num_dense_layers
        if self.model.settings.moe is None:
            return slice(0, 0)
        return slice(max(self.layers.start - dense, 0), max(self.layers.stop - dense, 0))

    def forward(self, x_BTD: Tensor | None = None, *, number: Tensor) -> Tensor:
        """A micro-batch, by its number (1,), in the way of whoever sent it."""
        assert self.visit is not None, "only inside Pipeline.both_ways or Pipeline.forward"
        return self.visit(self, x_BTD, int(number))

    def through(
        self, x_BTD: Tensor | None, tokens_BT: Tensor, positions_BT: Tensor, mask: Mask, facts: TokenFacts
    ) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """As the whole model's forward, of this part alone: x_BTD are the part's before, None for the first one."""
        if x_BTD is None:
            x_BTD = self.embedding(tokens_BT)
        x_BTD, routing = self.model.through(self.layers, x_BTD, positions_BT, mask, facts)
        return (self.norm(x_BTD) if self.is_last else x_BTD), routing


def split_layers(model: Transformer, mesh: Mesh, settings: ParallelSettings, layouts: dict[str, Layout]) -> None:
    """Leave on this rank its parts of a model on the meta device, in `model.pipeline`, and say whose all others are.

    What cuts single layers has to come before it, so that every rank knows how those of others are cut.
    """
    group = mesh.group("pipeline")
    if group is None:
        return
    parts, here = num_parts(settings), mesh.grid.place("pipeline", mesh.world.rank)
    for name, layout in layouts.items():
        layouts[name] = replace(layout, stage=stage_of(name, settings, model.settings.num_layers))
    mine = [Part(model, index, parts) for index in range(here, parts, settings.pipeline)]
    kept = {layer for part in mine for layer in part.layers}
    for layer in set(range(len(model.blocks))) - kept:
        model.blocks[layer] = Elsewhere()
    if not mine[0].is_first:
        del model.embedding
    if not mine[-1].is_last:
        del model.norm, model.head
    model.pipeline = Pipeline(mine, parts, group, settings.pipelining.schedule)
