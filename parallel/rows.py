"""Rows on several ranks: the part of a micro-batch that one rank of a group works on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attention.mask import Documents, Mask
from context.layout import Layout, padded_length
from context.plan import SplitMask
from data.batches import Batch
from data.rows import NO_TARGET
from parallel.mesh import SequenceSettings


@dataclass(frozen=True)
class SplitBatch(Batch):
    """One rank's tokens of a micro-batch: T / W of each row, in the order of their places, and what is counted of them.

    `lengths` are all documents of the whole rows, for attention reaches beyond this rank; positions and places are
    those in the document and in the whole row. Rows that do not divide were padded: `num_padding` places at each end.
    """

    layout: Layout
    num_padding: int

    @property
    def sequence_length(self) -> int:
        """Tokens of a whole row."""
        return self.layout.row_length - self.num_padding

    @property
    def num_documents(self) -> int:
        """See Batch; over the ranks of the group they sum to those of the whole rows."""
        starts = torch.tensor([0, *accumulate(self.lengths)], device=self.places_BT.device)
        in_step_BT = torch.arange(len(self.places_BT), device=starts.device)[:, None] * self.layout.row_length
        is_start_BT = torch.isin(in_step_BT + self.places_BT, starts)
        return int((is_start_BT & (self.places_BT < self.sequence_length)).sum())

    @property
    def mask_lengths(self) -> tuple[int, ...]:
        """See Batch; what was added to a row is a stretch of its own."""
        rows = (self.sequence_length,) * len(self.tokens_BT)
        return self.lengths if self.has_document_mask else lengthen(rows, self.sequence_length, self.num_padding)


def mask_of(batch: Batch) -> Mask:
    """What attention may see in this micro-batch: each document itself, or whole rows, wherever their tokens lie."""
    documents = Documents(batch.mask_lengths)
    if isinstance(batch, SplitBatch):
        return SplitMask(documents=documents, layout=batch.layout)
    return Mask(documents=documents)


def split_batch(
    batch: Batch, settings: SequenceSettings, num_ranks: int, rank: int, window: int | None = None
) -> SplitBatch:
    """The part of one rank; every rank computes the same layout from the documents, and nothing is exchanged.

    window: what the layers see at most, for a layout that balances their work.
    """
    layout, _ = lay_out(batch.mask_lengths, len(batch.tokens_BT), settings, num_ranks, window)
    whole = pad(batch, layout.row_length)
    share = {name: layout.shard(value, rank) for name, value in whole.items()}
    counts = {
        "num_targets": int((share["labels_BT"] != NO_TARGET).sum()),
        "num_tokens": layout.num_local_tokens,
        "num_real": int(share["is_real_BT"].sum()),
    }
    extra = layout.row_length - batch.sequence_length
    lengths = lengthen(batch.lengths, batch.sequence_length, extra)
    extras = {"layout": layout, "num_padding": extra, "lengths": lengths}
    return SplitBatch(**{**vars(batch), **share, **counts, **extras})


def lay_out(
    lengths: Sequence[int], num_rows: int, settings: SequenceSettings, num_ranks: int, window: int | None = None
) -> tuple[Layout, tuple[int, ...]]:
    """The layout of rows that these documents fill, and the documents with the padding at each row's end, if any."""
    kind, chunks, row_length = settings.layout, settings.chunks_per_rank, sum(lengths) // num_rows
    padded = padded_length(row_length, kind, num_ranks, chunks)
    lengths = lengthen(lengths, row_length, padded - row_length)
    return Layout.make(kind, num_rows, padded, num_ranks, lengths, chunks_per_rank=chunks, window=window), lengths


def lengthen(lengths: Sequence[int], row_length: int, extra: int) -> tuple[int, ...]:
    """The documents of rows that get `extra` places at their ends: a document of its own in each row, if any."""
    ends = accumulate(lengths)
    pairs = ((n,) if end % row_length or not extra else (n, extra) for n, end in zip(lengths, ends, strict=True))
    return tuple(chain.from_iterable(pairs))


def pad(batch: Batch, row_length: int) -> dict[str, Tensor]:
    """The batch's (B, T) tensors, longer: what is added is not real, aims at nothing, and is a document of its own."""
    length = batch.sequence_length
    extra = row_length - length
    tensors = {name: value for name, value in vars(batch).items() if name.endswith("_BT")}
    if not extra:
        return tensors
    added = {"labels_BT": NO_TARGET}
    tensors = {name: F.pad(value, (0, extra), value=added.get(name, 0)) for name, value in tensors.items()}
    tensors["positions_BT"][:, length:] = torch.arange(extra)
    tensors["places_BT"][:, length:] = torch.arange(length, row_length)
    return tensors


def fingerprint(microbatches: Sequence[Batch]) -> bytes:
    """Bytes that two ranks share only when their micro-batches are the same: documents, tokens and what is aimed at."""
    seal = hashlib.blake2b(digest_size=16)
    for batch in microbatches:
        seal.update(np.asarray(batch.lengths, dtype=np.int64).tobytes())
        for tensor in (batch.keys_B, batch.tokens_BT, batch.labels_BT, batch.weights_BT):
            seal.update(tensor.numpy().tobytes())
    return seal.digest()
