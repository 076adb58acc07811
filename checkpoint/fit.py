"""Whether tensors that somebody saved are those wanted here: by name, shape and dtype, before any is loaded."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from checkpoint.tensor_file import Outline, outline_of
from settings import Refusal

MOST_LINES = 10
WAY_OUT = "Use the configuration that wrote it (config.toml beside it), or start anew with --fresh"


def check_same(what: str, saved: Mapping[str, Outline], ours: Mapping[str, Outline], way_out: str = WAY_OUT) -> None:
    """Raise Refusal naming the tensors that only one side has, or that differ in shape or dtype.

    what: the beginning of the message, up to what was found to differ.
    """
    lines = [f"  {name}: not in the checkpoint" for name in ours.keys() - saved.keys()]
    lines += [f"  {name}: only in the checkpoint, {_shape(saved[name])}" for name in saved.keys() - ours.keys()]
    for name in ours.keys() & saved.keys():
        if saved[name] != ours[name]:
            theirs, wanted = (f"{_shape(side[name])} {side[name]['dtype']}" for side in (saved, ours))
            lines.append(f"  {name}: {theirs} in the checkpoint, {wanted} here")
    if lines:
        more = [f"  and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
        raise Refusal("\n".join([f"{what}:", *sorted(lines)[:MOST_LINES], *more, way_out]))


def check_weights(where: Path | str, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise Refusal where the weights of a checkpoint are not those of `model`, built as its configuration says."""
    saved = {name: outline_of(tensor) for name, tensor in weights.items()}
    ours = {name: outline_of(tensor) for name, tensor in model.state_dict().items()}
    what = f"{where}: its model.safetensors does not hold the model of its config.toml"
    check_same(what, saved, ours, "Put a good copy back, or use another checkpoint")


def _shape(facts: Outline) -> tuple[int, ...]:
    return tuple(facts["shape"])
