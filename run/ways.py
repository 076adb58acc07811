"""What no backend can do is refused before the run's folder exists, and what `auto` has chosen is said."""

from collections.abc import Iterator

import torch

from attention.kinds import AnyAttention
from context.stages import Stage
from model.kept import Numbers
from model.transformer import Transformer
from parallel.fsdp import reshard
from parallel.pipeline import roots_of
from parallel.recompute import BudgetSettings, in_words
from parallel.sequence import split_attention
from run.needs import kinds_of
from run.pipeline_pass import try_parts
from run.start import Run


def try_layers(model: Transformer, stage: Stage, run: Run) -> None:
    """One forward pass of a token, or of one for each rank that shares tokens out, and each layer's way to attend in
    training chosen: raises Refusal, or tells.

    Over every number of ranks that hold rows together in some stage.
    """
    model.use_rotary(stage.rotary)
    if run.mesh.grid.pipeline > 1:
        try_parts(model, stage, run)
    else:
        try_one(model, run)
    for root in roots_of(model):
        reshard(root)  # or the optimizer would be given what was gathered
    for size, group in run.row_groups.items():
        split_attention(model, group)
        over = f" over {size} ranks" if size > 1 else ""
        run.say(f"attention{over}: {', '.join(ways_to_attend(model, run))}")
    split_attention(model, run.row_group)
    for line in choose_kinds(model.vocab_size, run):
        run.say(line)


@torch.no_grad()
def try_one(model: Transformer, run: Run) -> None:
    """One forward pass of a token, or of one for each rank that shares tokens out."""
    with run.autocast():
        model(torch.zeros(1, run.mesh.grid.tensor, dtype=torch.int64, device=run.device))


def choose_kinds(vocab_size: int, run: Run) -> Iterator[str]:
    """What of each layer is computed again, by a memory budget if there is one: chosen for every stage, and in words.

    Raises Refusal where some stage cannot keep to it.
    """
    config, numbers = run.config, Numbers(run.dtype.itemsize, run.device.type)
    if isinstance(config.recompute, BudgetSettings):
        for stage in config.stages:
            run.kinds[stage.index] = kinds_of(config, vocab_size, stage.longest_step(), run.world.size, numbers)
            yield f"recompute in context.stages.{stage.index}: {in_words(run.kinds[stage.index])}"
    elif config.recompute != "none":
        yield f"recompute: {in_words([config.recompute] * config.model.num_layers)}"
    if config.offload:
        moves = "leave for" if run.device.type != "cpu" else "are anyway in"
        yield f"offload: activations {moves} host memory"


def ways_to_attend(model: Transformer, run: Run) -> list[str]:
    """`full layers by sdpa`, for each kind of layer that there is."""
    ways = []
    for layer in model.modules():
        if isinstance(layer, AnyAttention):
            backend = layer.attend.backend(layer.training_needs(run.device.type, run.dtype))
            ways.append(f"{'full' if layer.window is None else 'window'} layers by {backend.name}")
    return list(dict.fromkeys(ways))
