"""First values of every parameter and buffer, from one table; each depends on the seed and its own name alone."""

import hashlib
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from model.transformer import ModelSettings, Transformer

Draw = Callable[[torch.Size, ModelSettings, torch.Generator], Tensor]


def initialize(model: Transformer, seed: int, device: torch.device | str) -> None:
    """Move the model from the meta device (or any other) to `device` and give every parameter its first values.

    The values are drawn in fp32 on the CPU, so that they are the same on every device and whatever order or layout the
    model is built in. Parameters that are tied stay tied.
    """
    model.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(first_values(name, tensor.shape, model.settings, seed))


def first_values(name: str, shape: torch.Size, settings: ModelSettings, seed: int) -> Tensor:
    """The first values of the parameter or buffer called `name`: a pure function of its arguments, fp32 on the CPU."""
    draw = next((draw for pattern, draw in TABLE if fnmatchcase(name, pattern)), None)
    assert draw is not None, f"no row of initialize.TABLE names {name}"
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return draw(shape, settings, torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))


def _normal(shape: torch.Size, settings: ModelSettings, generator: torch.Generator) -> Tensor:
    return nn.init.normal_(torch.empty(shape), std=settings.initial_std, generator=generator)


def _residual(shape: torch.Size, settings: ModelSettings, generator: torch.Generator) -> Tensor:
    """Narrower by sqrt(2 * layers), so that the residual stream keeps its scale with depth (GPT-2, section 2.3)."""
    return _normal(shape, settings, generator).div_((2 * settings.num_layers) ** 0.5)


def _ones(shape: torch.Size, _settings: ModelSettings, _generator: torch.Generator) -> Tensor:
    return torch.ones(shape)


def _zeros(shape: torch.Size, _settings: ModelSettings, _generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


# The first row that fits decides; a new parameter needs a row.
TABLE: tuple[tuple[str, Draw], ...] = (
    ("*norm.weight", _ones),
    ("embedding.weight", _normal),
    ("head.weight", _normal),
    ("*.attention.output.weight", _residual),
    ("*.attention.*.weight", _normal),
    ("*.attention.sink_H", _zeros),
    ("*.feed_forward.router.bias_E", _zeros),
    ("*.feed_forward.router.weight", _normal),
    ("*.feed_forward.shared.gate.weight", _normal),
    ("*.feed_forward.*down*", _residual),
    ("*.feed_forward.*up*", _normal),
)
