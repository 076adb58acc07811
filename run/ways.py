"""What no backend can do is refused before the run's folder exists, and what `auto` has chosen is said."""

import torch

from attention.kinds import AnyAttention
from context.stages import Stage
from model.transformer import Transformer
from parallel.sequence import split_attention
from run.start import Run


def try_layers(model: Transformer, stage: Stage, run: Run) -> None:
    """One forward pass of a token, or of one for each rank that shares tokens out, and each layer's way to attend in
    training chosen: raises Refusal, or tells.

    Over every number of ranks that hold rows together in some stage.
    """
    model.use_rotary(stage.rotary)
    with torch.no_grad(), run.autocast():
        model(torch.zeros(1, run.mesh.grid.tensor, dtype=torch.int64, device=run.device))
    for size, group in run.row_groups.items():
        split_attention(model, group)
        over = f" over {size} ranks" if size > 1 else ""
        run.say(f"attention{over}: {', '.join(ways_to_attend(model, run))}")
    split_attention(model, run.row_group)


def ways_to_attend(model: Transformer, run: Run) -> list[str]:
    """`full layers by sdpa`, for each kind of layer that there is."""
    ways = []
    for layer in model.modules():
        if isinstance(layer, AnyAttention):
            backend = layer.attend.backend(layer.training_needs(run.device.type, run.dtype))
            ways.append(f"{'full' if layer.window is None else 'window'} layers by {backend.name}")
    return list(dict.fromkeys(ways))
