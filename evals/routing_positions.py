"""Routing by position: whether the experts that a long document's beginning uses are those that its end uses."""

from typing import Annotated

import numpy as np
import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from evals.lengths import DISTINCT, Length
from evals.long_documents import long_windows, sources_with_long_documents
from evals.routing import describe_load
from evals.scoring import Cell, Materials, Rows, evaluating, forwards
from settings import Section


class RoutingPositionsSettings(Section):
    length: Length
    """Tokens in a window; only documents longer than this are read."""
    buckets: Length = 8
    """The window is cut into so many stretches of equal length."""
    sources: Annotated[tuple[str, ...], DISTINCT] = ()
    """Which sources are read; left out, all that hold a document long enough."""
    tokens: PositiveInt = 16_384
    """At most so many tokens are read of each source."""

    @model_validator(mode="after")
    def check_buckets(self) -> "RoutingPositionsSettings":
        if self.buckets > self.length:
            raise ValueError(f"buckets={self.buckets} is more than length={self.length}; use {self.length} or fewer")
        return self


def check(settings: RoutingPositionsSettings, materials: Materials) -> None:
    """Refuse a length that no document of the sources reaches."""
    sources_with_long_documents(materials, settings.sources, settings.length, "routing_positions")


def run(model: nn.Module, settings: RoutingPositionsSettings, materials: Materials, seed: int) -> list[Cell]:
    """One cell for each source, MoE layer and stretch; none for a dense model. Score: normalised entropy of the load.

    Extra: `layer`, `start`, `stop` (positions), `overlap` (the share of the load that lies where the first stretch's
    does: 1 where both use the experts alike), and the load as in `routing`.
    """
    cells = []
    edges = np.linspace(0, settings.length, settings.buckets + 1).round().astype(int)
    for name in sources_with_long_documents(materials, settings.sources, settings.length, "routing_positions"):
        rows = long_windows(materials, name, settings.length, settings.tokens, seed)
        for layer, counts_XE in enumerate(loads(model, materials, rows, edges)):
            share_XE = counts_XE / np.maximum(counts_XE.sum(axis=1, keepdims=True), 1)
            for bucket, (start, stop) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
                score, load = describe_load(counts_XE[bucket])
                overlap = float(np.minimum(share_XE[0], share_XE[bucket]).sum())
                extra = {"layer": layer, "start": start, "stop": stop, "overlap": overlap, **load}
                count = len(rows.tokens_BT) * (stop - start)
                cells.append(Cell(f"routing_positions/{name}", settings.length, None, score, count, extra))
    return cells


def loads(model: nn.Module, materials: Materials, rows: Rows, edges: np.ndarray) -> list[np.ndarray]:
    """For each MoE layer how many choices of each stretch fell on each expert: (stretches, E)."""
    length, num_buckets = rows.tokens_BT.shape[1], len(edges) - 1
    bucket_T = torch.as_tensor(np.repeat(np.arange(num_buckets), np.diff(edges)))
    totals: list[Tensor] = []
    with evaluating(model, materials):
        for part, _, stats in forwards(model, materials, rows):
            bucket_N = bucket_T.repeat(part.stop - part.start)
            assert len(bucket_N) == (part.stop - part.start) * length
            counts = [count_choices(layer.selected_NK.cpu(), layer.num_experts, bucket_N) for layer in stats]
            totals = [old + new for old, new in zip(totals, counts, strict=True)] if totals else counts
    return [counts_XE.numpy() for counts_XE in totals]


def count_choices(selected_NK: Tensor, num_experts: int, bucket_N: Tensor) -> Tensor:
    """How often the tokens of each bucket want each expert: int64 (buckets, E); null experts are left out."""
    num_buckets = int(bucket_N.max()) + 1
    is_real_NK = (selected_NK >= 0) & (selected_NK < num_experts)
    place_NK = bucket_N[:, None] * num_experts + selected_NK
    return torch.bincount(place_NK[is_real_NK], minlength=num_buckets * num_experts).view(num_buckets, num_experts)
