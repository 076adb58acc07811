"""A micro-batch as the model takes it, and how rows are cut into micro-batches."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.demand import Demand
from data.positions import chunks_of
from data.rows import NO_TARGET, Rows


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B packed rows of T tokens.

    tokens_BT int64; labels_BT int64, -100 where nothing is to be predicted; weights_BT float32, the loss weight of each
    label; positions_BT int64, what rotation goes by: as `data.positions` says; places_BT int64, the place in the row;
    sources_B int64, places in `Batches.names`. lengths: document pieces in row-major order; they sum to B*T and none
    crosses a row. is_real_BT: False where padding stands, at rows' ends. padding_B: how many such places a whole row
    has. rows_B: each row's number in the step; keys_B: a number that no other row of the run has; all int64.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    weights_BT: Tensor
    positions_BT: Tensor
    places_BT: Tensor
    lengths: tuple[int, ...]
    sources_B: Tensor
    is_real_BT: Tensor
    padding_B: Tensor
    rows_B: Tensor
    keys_B: Tensor
    num_targets: int
    num_tokens: int
    num_real: int
    """Tokens that are no padding."""
    has_document_mask: bool = field(default=True, kw_only=True)
    """False: attention goes over the borders of documents, through the whole row."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        return self.tokens_BT.shape[1]

    @property
    def num_documents(self) -> int:
        """Document pieces that begin here; padding at a row's end is one too."""
        return len(self.lengths)

    @property
    def mask_lengths(self) -> tuple[int, ...]:
        """The stretches inside which attention may look back, row by row: documents, or whole rows."""
        return self.lengths if self.has_document_mask else (self.sequence_length,) * len(self.tokens_BT)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; to CUDA from pinned memory, without waiting."""
        device = torch.device(device)

        def moved(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and tensor.device.type == "cpu":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        tensors: Any = {name: moved(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def cut(  # noqa: PLR0917 (columns of one table of rows)
    rows: Rows,
    demand: Demand,
    source_R: np.ndarray,
    row_R: np.ndarray,
    keys_R: np.ndarray,
    rows_per_microbatch: int,
) -> list[Batch]:
    """Cut rows into micro-batches; positions start anew at each document, or at each row where there is no mask."""
    num_rows, sequence_length = rows.tokens_RT.shape
    positions_RT = _positions(rows, demand, keys_R).reshape(num_rows, sequence_length)
    is_real_RT = np.arange(sequence_length) < (sequence_length - rows.padding_R)[:, None]
    document_ends_R = np.cumsum(rows.counts_R)
    batches = []
    for first in range(0, num_rows, rows_per_microbatch):
        window = slice(first, first + rows_per_microbatch)
        documents = slice(document_ends_R[first] - rows.counts_R[first], document_ends_R[window][-1])
        labels_BT = rows.labels_RT[window]
        batches.append(
            Batch(
                tokens_BT=torch.from_numpy(rows.tokens_RT[window]),
                labels_BT=torch.from_numpy(labels_BT),
                weights_BT=torch.from_numpy(rows.weights_RT[window]),
                positions_BT=torch.from_numpy(positions_RT[window]),
                places_BT=torch.arange(sequence_length).repeat(len(labels_BT), 1),
                lengths=tuple(rows.document_lengths[documents].tolist()),
                sources_B=torch.from_numpy(source_R[window]),
                is_real_BT=torch.from_numpy(is_real_RT[window]),
                padding_B=torch.from_numpy(rows.padding_R[window]),
                rows_B=torch.from_numpy(row_R[window]),
                keys_B=torch.from_numpy(keys_R[window]),
                num_targets=int((labels_BT != NO_TARGET).sum()),
                num_tokens=labels_BT.size,
                num_real=int(is_real_RT[window].sum()),
                has_document_mask=demand.has_document_mask,
            )
        )
    return batches


def _positions(rows: Rows, demand: Demand, keys_R: np.ndarray) -> np.ndarray:
    lengths, counts_R = rows.document_lengths, rows.counts_R
    if not demand.has_document_mask:
        lengths, counts_R = np.full_like(counts_R, rows.tokens_RT.shape[1]), np.ones_like(counts_R)
    return chunks_of(demand.positions, lengths, counts_R, keys_R).positions(lengths)
