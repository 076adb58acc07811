"""A copy of this rank's parts in host memory, and how the parts of all ranks become whole tensors in files.

Copying is all that a step waits for. What is written afterwards, by a thread, is read from the copy alone.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.deal import Entry, FileDeal, Holdings, deal, describe
from checkpoint.peers import Peers, Sent
from checkpoint.tensor_file import WrittenFile, write_tensor_file
from parallel.layout import Layouts
from parallel.mesh import Grid


@dataclass(frozen=True)
class Snapshot:
    """All tensors of a checkpoint as they were at one moment, each rank with its parts."""

    files: tuple[FileDeal, ...]
    host: Mapping[str, Tensor]
    """This rank's parts in host memory, by name: those of them that are written or sent from here."""
    peers: Peers
    grid: Grid

    @property
    def num_bytes(self) -> int:
        """Of all tensors in all files."""
        layouts = [entry.layout for file in self.files for entry in file.entries]
        return sum(layout.shape.numel() * layout.dtype.itemsize for layout in layouts)

    def send(self) -> list[Sent]:
        """Begin to send all that other ranks write; they take it when they come to it."""
        me = self.peers.rank
        return [
            self.peers.send(_raw(self.host[entry.name]), file.writer, entry.number)
            for file in self.files
            for entry in file.entries
            if file.writer != me and me in entry.sources
        ]

    def write(self, partial: Path) -> list[WrittenFile]:
        """Write this rank's files of what the ranks send, all of which have to.

        Raises what writing raises once everything has been received: nobody waits for a rank whose disk is full.
        """
        written: list[WrittenFile] = []
        trouble: Exception | None = None
        for file in self.files:
            if file.writer == self.peers.rank:
                tensors = self._assemble(file)
                try:
                    if trouble is None:
                        outlines = {entry.name: entry.outline for entry in file.entries}
                        done = write_tensor_file(partial / file.name, outlines, tensors)
                        written.append(replace(done, tied=dict(file.tied)))
                except Exception as error:
                    trouble = error
                for _ in tensors:
                    pass
        if trouble is not None:
            raise trouble
        return written

    def _assemble(self, file: FileDeal) -> Iterator[tuple[str, Tensor]]:
        """The whole tensors of a file in turn; the next one is under way while one is written."""
        before: tuple[Entry, dict[int, Tensor], list[Sent]] | None = None
        for entry in (*file.entries, None):
            coming = None if entry is None else (entry, *self._receive(entry))
            if before is not None:
                now, parts, under_way = before
                for sent in under_way:
                    sent.wait()
                yield now.name, self._whole(now, parts)
            before = coming

    def _receive(self, entry: Entry) -> tuple[dict[int, Tensor], list[Sent]]:
        """The parts of a tensor by rank, those of other ranks still under way."""
        parts, under_way = {}, []
        for rank in entry.sources:
            if rank == self.peers.rank:
                parts[rank] = self.host[entry.name]
            else:
                parts[rank] = torch.empty(entry.layout.part_shape(self.grid, rank), dtype=entry.layout.dtype)
                under_way.append(self.peers.receive(_raw(parts[rank]), rank, entry.number))
        return parts, under_way

    def _whole(self, entry: Entry, parts: Mapping[int, Tensor]) -> Tensor:
        if not entry.layout.cuts and parts:
            return next(iter(parts.values()))
        whole = torch.empty(entry.layout.shape, dtype=entry.layout.dtype)
        for rank, part in parts.items():
            entry.layout.put(whole, part, self.grid, rank)
        return whole


class Camera:
    """Takes snapshots, again and again into the same memory: one has to be written before the next is taken."""

    def __init__(self, peers: Peers, layouts: Layouts, grid: Grid) -> None:
        self.peers, self.layouts, self.grid = peers, layouts, grid
        self._host: dict[str, Tensor] = {}
        self._files: tuple[FileDeal, ...] = ()
        self._seen = ""

    def take(self, holdings: Holdings, tied: Mapping[str, str]) -> Snapshot:
        """Copy what is to be written or sent from here; all ranks have to call. Back when the copy is complete."""
        words = describe(holdings, tied, self.layouts, self.grid, self.peers.rank)
        digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()
        if any(self.peers.tell(digest != self._seen)):
            self._files = deal(self.peers.tell(words), self.layouts, self.grid)
            self._seen = digest
            self._host.clear()
        parts = {name: held.tensor for named in holdings.values() for name, held in named.items()}
        wanted = {
            entry.name: parts[entry.name]
            for file in self._files
            for entry in file.entries
            if self.peers.rank in entry.sources
        }
        copy_to_host(wanted, self._host)
        return Snapshot(self._files, self._host, self.peers, self.grid)


@torch.no_grad()
def copy_to_host(tensors: Mapping[str, Tensor], host: dict[str, Tensor]) -> None:
    """Copy tensors into host memory, made where there is none yet: pinned, and all at once, from a GPU."""
    is_on_gpu = any(tensor.is_cuda for tensor in tensors.values())
    for name, tensor in tensors.items():
        if name not in host:
            host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        host[name].copy_(tensor, non_blocking=True)
    if is_on_gpu:
        torch.cuda.synchronize()


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in one piece, in its own memory."""
    return tensor.view(-1).view(torch.uint8)
