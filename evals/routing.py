"""Routing: how the experts of each layer share the work on held-out text, where no balance loss has had its say."""

from typing import Annotated

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from context.rotary import AnyRotary
from evals.lengths import DISTINCT, Length
from evals.scoring import Cell, Materials, Rows, evaluating, forwards, sources_of
from evals.windows import read, spread
from model.transformer import Transformer
from moe.telemetry import choice_overlap
from settings import Refusal, Section


class RoutingSettings(Section):
    length: Length
    """Tokens in a window."""
    sources: Annotated[tuple[str, ...], DISTINCT] = ()
    """Which sources are read; left out, all that have held-out text."""
    tokens: PositiveInt = 16_384
    """At most so many tokens are read of each source."""


def check(settings: RoutingSettings, materials: Materials) -> None:
    """Refuse sources that are unknown or shorter than one window."""
    for name in sources_of(materials, settings.sources, "evals.routing.sources"):
        available = len(materials.held_out[name])
        if available <= settings.length:
            raise Refusal(
                f"evals.routing.length={settings.length} does not fit: source {name!r} has {available} held-out "
                f"tokens; lower it to {max(available - 1, 1)} or less, or name longer sources in evals.routing.sources"
            )


def run(model: nn.Module, settings: RoutingSettings, materials: Materials, seed: int) -> list[Cell]:
    """One cell for each source and MoE layer, none for a dense model; score is the normalised entropy of the load.

    1: every expert has the same load; 0: one expert has it all. Extra: `layer` (counted over the MoE layers),
    `max_violation` (highest load over the mean, minus 1), `dead_experts`, and the shares `load_0`, `load_1`, ...
    """
    check(settings, materials)
    cells = []
    for name in sources_of(materials, settings.sources, "evals.routing.sources"):
        rows = _rows(settings, materials, name, seed)
        counts_LE: list[Tensor] = []
        with evaluating(model, materials):
            for _, _, stats in forwards(model, materials, rows):
                counts = [layer.counts_E.to(torch.int64) for layer in stats]
                counts_LE = [old + new for old, new in zip(counts_LE, counts, strict=True)] if counts_LE else counts
        for layer, counts_E in enumerate(counts_LE):
            score, extra = describe_load(counts_E.cpu().numpy())
            cells.append(
                Cell(f"routing/{name}", settings.length, None, score, rows.tokens_BT.size, {"layer": layer, **extra})
            )
    return cells


def shift(
    model: Transformer, settings: RoutingSettings, materials: Materials, seed: int, rotary: AnyRotary
) -> list[Cell]:
    """What another RoPE does to the routing of the same tokens: one cell for each source and MoE layer.

    score: the mean share of a token's experts that stay the same when `rotary` takes the place of the model's own,
    which the model has again in the end.
    """
    assert model.rotary is not None
    before, cells = model.rotary, []
    for name in sources_of(materials, settings.sources, "evals.routing.sources"):
        rows = _rows(settings, materials, name, seed)
        ours = _choices(model, materials, rows)
        try:
            model.use_rotary(rotary)
            theirs = _choices(model, materials, rows)
        finally:
            model.rotary = before
        for layer, pair in enumerate(zip(ours, theirs, strict=True)):
            score, task = float(choice_overlap(*pair)), f"routing_shift/{name}"
            cells.append(Cell(task, settings.length, None, score, rows.tokens_BT.size, {"layer": layer}))
    return cells


def _rows(settings: RoutingSettings, materials: Materials, name: str, seed: int) -> Rows:
    tokens = materials.held_out[name]
    starts = spread(len(tokens), settings.length, settings.tokens, seed)
    return read(tokens, starts, settings.length, materials.tokenizer.end_of_text)


def _choices(model: nn.Module, materials: Materials, rows: Rows) -> list[Tensor]:
    """For each MoE layer the experts (N, K) that the tokens of all rows want."""
    with evaluating(model, materials):
        parts = [[layer.selected_NK for layer in stats] for _, _, stats in forwards(model, materials, rows)]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def describe_load(counts_E: np.ndarray) -> tuple[float, dict[str, float]]:
    """(normalised entropy, extra fields) of the rows that each expert was given."""
    load_E = counts_E / max(counts_E.sum(), 1)
    busy = load_E[load_E > 0]
    num_experts = len(load_E)
    entropy = float(-(busy * np.log(busy)).sum() / np.log(num_experts)) if num_experts > 1 else 1.0
    extra: dict[str, float] = {
        "max_violation": float(load_E.max() * num_experts - 1),
        "dead_experts": int((counts_E == 0).sum()),
    }
    return entropy, extra | {f"load_{expert}": float(share) for expert, share in enumerate(load_E)}
