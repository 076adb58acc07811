"""What splitting a sequence costs: virtual ranks on one device, and real ones on a CPU, against ringmaster and one."""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from attention.contract import Backend, Needs
from attention.core import choose
from attention.mask import Documents, Mask
from benchmarks.attention_rivals import HEADS, PLAIN, Heads, make_documents
from benchmarks.moe import Row
from context.comm import GroupComm
from context.layout import Layout
from context.local_comm import LocalComm
from context.methods import build_method
from context.plan import SplitMask

VIRTUAL = {"cuda": (2, 4), "cpu": (2, 4)}
SHARE = {"cuda": 32768, "cpu": 1024}
"""Tokens of a virtual rank."""
RINGMASTER = "ringmaster, packed zigzag"
DOCUMENTS = 8
"""Of a sequence over processes."""


def virtual(device: str, arguments: argparse.Namespace) -> list[Row]:
    """The ring's virtual ranks, one after another on one device, against one call of the same backend."""
    rows: list[Row] = []
    for size in arguments.ranks:
        length = size * arguments.share
        for mask, kind in (("causal", "zigzag"), ("documents", "balanced")):
            if time.monotonic() < arguments.deadline:
                documents = make_documents(length) if mask == "documents" else Documents((length,))
                layout = Layout.make(kind, 1, length, size, documents.lengths)
                found = efficiency(layout, documents, device, arguments)
                rows.append({"ranks": size, "mask": mask, "layout": kind, "length": length, **found})
    return rows


def efficiency(layout: Layout, documents: Documents, device: str, arguments: argparse.Namespace) -> Row:
    """Milliseconds of a forward and backward pass alone and over the virtual ranks, and the first over the second."""
    tensors = make_tensors(layout.row_length, HEADS[device], getattr(torch, arguments.dtype), device)
    whole, split = Mask(documents=documents), SplitMask(documents=documents, layout=layout)
    q, k, v, _ = tensors
    needs = Needs.of(q, k, v, whole, training=True)
    # Any comm will do to ask what a method needs.
    inner = choose("auto", LocalComm.run(1, lambda comm: build_method("ring", comm).needs(needs))[0])
    shares = [[layout.shard(x, rank) for x in tensors] for rank in range(layout.num_ranks)]

    def over_ranks() -> None:
        def one(comm: LocalComm) -> None:
            answer(build_method("ring", comm).over(inner), shares[comm.rank], split)

        LocalComm.run(layout.num_ranks, one, timeout=300.0)

    alone: list[float] = []
    spread: list[float] = []
    for turn in range(max(2, arguments.rounds // 2) + 1):
        if turn < 3 or sum(alone) + sum(spread) < 2 * arguments.budget:
            alone.append(seconds_of(lambda: answer(inner, tensors, whole), device))
            spread.append(seconds_of(over_ranks, device))
    # The first of each compiles and plans.
    once, together = statistics.median(alone[1:]), statistics.median(spread[1:])
    return {
        "entrant": f"ring of {inner.name}",
        "alone_ms": round(once * 1e3, 2),
        "ranks_ms": round(together * 1e3, 2),
        "efficiency": round(once / together, 3),
        "rounds": len(spread) - 1,
    }


def make_tensors(length: int, heads: Heads, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and the gradient of the output, the same on every rank."""
    torch.manual_seed(0)
    counts = (heads.queries, heads.keys, heads.keys, heads.queries)
    return [torch.randn(1, length, count, heads.channels, dtype=dtype, device=device) for count in counts]


def answer(backend: Backend, tensors: list[Tensor], mask: Mask) -> None:
    """One forward and one backward pass."""
    q, k, v, grad = tensors
    out, lse = backend.forward(q, k, v, mask, PLAIN)
    backend.backward(grad, q, k, v, out, lse, mask, PLAIN)


def seconds_of(work: Callable[[], object], device: str) -> float:
    """On a CPU of processor time, of all threads: virtual ranks would otherwise share the cores."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Job:
    """What one entrant's processes do."""

    name: str
    ranks: int
    length: int
    rounds: int
    folder: str

    @property
    def documents(self) -> Documents:
        return make_documents(self.length, DOCUMENTS)

    @property
    def layout(self) -> Layout:
        kind = "zigzag" if self.name == RINGMASTER else "balanced"
        return Layout.make(kind, 1, self.length, self.ranks, self.documents.lengths)


def processes(length: int, rounds: int) -> list[Row]:
    """Forward and backward milliseconds of the slowest of 2 ranks with a thread each, its peak of memory, and those of
    one rank alone; each entrant in processes of its own."""
    rows: list[Row] = []
    for name, ranks in (("one rank", 1), ("ring", 2), ("groupcast", 2), (RINGMASTER, 2)):
        if name == RINGMASTER and find_spec("ringmaster") is None:
            rows.append({"entrant": name, "note": "not installed: see the head of benchmarks/attention.py"})
            continue
        with tempfile.TemporaryDirectory() as folder:
            job = Job(name, ranks, length, rounds, folder)
            torch.multiprocessing.spawn(work_of_a_rank, (job,), nprocs=ranks)
            found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
        rows.append({"entrant": name, "ranks": ranks, **{key: max(row[key] for row in found) for key in found[0]}})
    for row in rows[1:]:
        if "forward_ms" in row:
            row["faster_than_one"] = round(total(rows[0]) / total(row), 2)
    return rows


def total(row: Row) -> float:
    return row["forward_ms"] + row["backward_ms"]


def work_of_a_rank(rank: int, job: Job) -> None:
    """Measure on one rank, and leave what was found in the job's folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(job.folder) / "store"), job.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.ranks)
    torch.save(timed_rank(rank, job), Path(job.folder) / f"{rank}.pt")
    # What still holds the group's tensors must be gone before it is.
    dist.barrier()
    dist.destroy_process_group()


def timed_rank(rank: int, job: Job) -> Row:
    tensors = [job.layout.shard(x, rank) for x in make_tensors(job.length, HEADS["cpu"], torch.float32, "cpu")]
    start = resident()
    forward, backward = passes_of(job, tensors)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(job.rounds + 1):
        for work, own in zip((forward, backward), times, strict=True):
            dist.barrier()
            begin = time.perf_counter()
            work()
            if turn:
                own.append(time.perf_counter() - begin)
    before, after = (round(statistics.median(own) * 1e3, 1) for own in times)
    fastest = [round(min(own) * 1e3, 1) for own in times]
    return {
        "forward_ms": before,
        "backward_ms": after,
        "fastest_forward_ms": fastest[0],
        "fastest_backward_ms": fastest[1],
        "peak_gibibytes": round(resident(), 2),
        "beyond_start_gibibytes": round(resident() - start, 2),
    }


def passes_of(job: Job, tensors: list[Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward, backward) of the job's entrant on this rank's share."""
    if job.name == RINGMASTER:
        return ringmaster(job, tensors)
    q, k, v, grad = tensors
    whole = Mask(documents=job.documents)
    backend, mask = choose("auto", Needs.of(q, k, v, whole, training=True)), whole
    if job.ranks > 1:
        assert dist.group.WORLD is not None
        backend = build_method(job.name, GroupComm(dist.group.WORLD)).over(backend)
        mask = SplitMask(documents=job.documents, layout=job.layout)
    kept: list[Tensor] = []

    def forward() -> None:
        kept[:] = backend.forward(q, k, v, mask, PLAIN)

    def backward() -> object:
        out, lse = kept
        return backend.backward(grad, q, k, v, out, lse, mask, PLAIN)

    return forward, backward


def ringmaster(job: Job, tensors: list[Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
    """axolotl-ringmaster's packed zigzag ring: heads before tokens, gradients by autograd."""
    from ringmaster.ring.zigzag import zigzag_ring_attention

    starts = job.documents.cu_seqlens("cpu")
    q, k, v = (x.transpose(1, 2).contiguous().requires_grad_() for x in tensors[:3])
    kept: list[Tensor] = []

    def forward() -> None:
        kept[:] = [zigzag_ring_attention(q, k, v, group=dist.group.WORLD, scaling=None, cu_seqlens=starts)]

    def backward() -> object:
        return torch.autograd.grad(kept.pop(), (q, k, v), tensors[3])

    return forward, backward


def resident() -> float:
    """The most GiB this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
