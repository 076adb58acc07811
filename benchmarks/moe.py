"""One MoE layer, forward and backward, against other people's on the same weights, in one process and in turn.

    python -m benchmarks.moe                           every shape of this device, fp32 and bf16 (on a GPU bf16)
    python -m benchmarks.moe --dtypes float32 --keep   and write benchmarks/results/moe-<device>.json

Each layer is a whole block: router, sort, experts, combine. Its error is measured first, on a slice of the tokens
against the loop in fp64. Then rivals take turns, so that a change in the machine's load hits all of them. On a CPU a
round is timed in processor time with one thread, on a GPU between CUDA events; the median of the rounds counts.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.moe_rivals import OURS, SHAPES, THEIRS, Ours, Rival, Shape, Weights, make_weights
from benchmarks.record import keep

SLICE = 128
"""Tokens on which a layer's error is measured."""
OUR_BEST = "ours, auto"
Row = dict[str, Any]


@dataclass
class Entry:
    """One layer that takes part, and what is known of it."""

    name: str
    layer: nn.Module
    facts: Row
    milliseconds: list[float] = field(default_factory=list)
    spent: float = 0.0


@dataclass(frozen=True)
class Task:
    """What every layer has to do, and how long all of it may take."""

    shape: Shape
    weights: Weights
    x_BTD: Tensor
    grad_BTD: Tensor
    truth: tuple[Tensor, Tensor]
    """Of the first SLICE tokens in fp64: the output and the gradient of x."""
    deadline: float

    @property
    def is_cuda(self) -> bool:
        return self.x_BTD.is_cuda

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline


def make_task(shape: Shape, dtype: torch.dtype, device: str, deadline: float) -> Task:
    weights = make_weights(shape, dtype, device)
    x_BTD, grad_BTD = (torch.randn(1, shape.tokens, shape.width, dtype=dtype, device=device) for _ in range(2))
    exact = Weights(weights.router_ED.double(), weights.gate_up.double(), weights.down.double())
    truth = pass_through(Ours("loop", "none", shape, exact), x_BTD[:, :SLICE].double(), grad_BTD[:, :SLICE].double())
    return Task(shape, weights, x_BTD, grad_BTD, truth, deadline)


def pass_through(layer: nn.Module, x_BTD: Tensor, grad_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the output and the gradient of x."""
    x_BTD = x_BTD.detach().requires_grad_()
    out_BTD = layer(x_BTD)
    out_BTD.backward(grad_BTD)
    layer.zero_grad(set_to_none=True)
    assert x_BTD.grad is not None
    return out_BTD.detach(), x_BTD.grad


def timed(layer: nn.Module, task: Task) -> float:
    """Milliseconds of one forward and backward pass."""
    if task.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        pass_through(layer, task.x_BTD, task.grad_BTD)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    pass_through(layer, task.x_BTD, task.grad_BTD)
    return (clock() - start) * 1e3


def enter(name: str, build: Rival, task: Task) -> Entry | Row:
    """The layer with its error and its memory, warmed up; or a row that says why it does not take part."""
    if task.is_over:
        return {"layer": name, "note": "not measured: the time was up"}
    try:
        layer = build(task.shape, task.weights)
        own = pass_through(layer, task.x_BTD[:, :SLICE], task.grad_BTD[:, :SLICE])
        error = max(relative(ours, truth) for ours, truth in zip(own, task.truth, strict=True))
        facts = {"error": float(f"{error:.1e}"), **memory(layer, task)}
    except Exception as failure:  # what other people's code may raise is theirs to choose
        text = str(failure).strip().partition("\n")[0][:160]
        return {"layer": name, "note": text if isinstance(failure, ValueError) else f"{type(failure).__name__}: {text}"}
    return Entry(name, layer, facts)


def memory(layer: nn.Module, task: Task) -> Row:
    """Bytes kept for the backward pass besides parameters and x, and on a GPU the peak of a step beyond what it had."""
    given = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), task.x_BTD)}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    if task.is_cuda:
        pass_through(layer, task.x_BTD, task.grad_BTD)  # kernels are compiled and tuned, which takes memory too
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if task.is_cuda else 0
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        pass_through(layer, task.x_BTD, task.grad_BTD)
    facts = {"saved_mebibytes": round(sum(saved.values()) / 2**20, 1)}
    if task.is_cuda:
        facts["peak_mebibytes"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    return facts


def relative(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item()


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """The most floating-point operations a second of a large product here."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: a @ b, device) for _ in range(20))


def _seconds(work: Callable[[], object], device: str) -> float:
    """Of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(task: Task, rounds: int, budget: float) -> list[Row]:
    """A row for each layer; `budget` are the seconds that one of them may take in all its rounds."""
    entered = [enter(name, build, task) for name, build in (OURS | THEIRS).items()]
    entries = [entry for entry in entered if isinstance(entry, Entry)]
    for _ in range(rounds):
        for entry in entries:
            if not task.is_over and (entry.spent < budget or not entry.milliseconds):
                entry.milliseconds.append(timed(entry.layer, task))
                entry.spent += entry.milliseconds[-1] / 1e3
    return [entry if isinstance(entry, dict) else _row(entry, task) for entry in entered]


def _row(entry: Entry, task: Task) -> Row:
    if not entry.milliseconds:
        return {"layer": entry.name, **entry.facts, "note": "not measured: the time was up"}
    median, fastest = statistics.median(entry.milliseconds), min(entry.milliseconds)
    times = {"milliseconds": round(median, 2), "fastest": round(fastest, 2), "rounds": len(entry.milliseconds)}
    return {"layer": entry.name, **times, **entry.facts}


def compare(shape: Shape, dtype: torch.dtype, device: str, arguments: argparse.Namespace) -> list[Row]:
    """All rows of one shape, with the floor, and with how much faster our own choice is than each of the others."""
    task = make_task(shape, dtype, device, arguments.deadline)
    # On a CPU without units for bf16 the floor is that of fp32, which is what can be reached.
    floor = shape.flops / matmul_rate(torch.float32 if device == "cpu" else dtype, device) * 1e3
    rows = measure(task, arguments.rounds, arguments.budget)
    best = next((row["milliseconds"] for row in rows if row["layer"] == OUR_BEST and "milliseconds" in row), None)
    for row in rows:
        if "milliseconds" in row:
            row["of_floor"] = round(row["milliseconds"] / floor, 2)
            row["ours_is_faster"] = None if best is None else round(row["milliseconds"] / best, 2)
    around = {"shape": shape.name, "dtype": _short(dtype), "floor_milliseconds": round(floor, 2)}
    return [{**around, **row} for row in rows]


def show(rows: list[Row]) -> None:
    columns = (
        "milliseconds",
        "fastest",
        "of_floor",
        "ours_is_faster",
        "error",
        "saved_mebibytes",
        "peak_mebibytes",
        "note",
    )
    first = rows[0]
    table = Table(
        "layer", *columns, title=f"{first['shape']}, {first['dtype']}: floor {first['floor_milliseconds']} ms"
    )
    for row in rows:
        table.add_row(row["layer"], *(str(row.get(column, "")) for column in columns))
    Console(width=180).print(table)


def device_slug(device: str) -> str:
    """What stands in the result's file name: cpu, or the GPU's name."""
    if device == "cpu":
        return device
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    usual = ["bfloat16"] if device == "cuda" else ["float32", "bfloat16"]
    parser.add_argument("--dtypes", nargs="+", default=usual, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shapes", nargs="+", type=int, help="which of the device's shapes, counted from 0")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds a layer may take in all its rounds")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is measured")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; with more than one, wall time counts")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/moe-<device>.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.deadline = time.monotonic() + 60 * arguments.minutes
    rows: list[Row] = []
    for dtype in arguments.dtypes:
        for index, shape in enumerate(SHAPES[device]):
            if arguments.shapes is None or index in arguments.shapes:
                rows += (own := compare(shape, getattr(torch, dtype), device, arguments))
                show(own)
    if arguments.keep:
        print(keep(f"moe-{device_slug(device)}", rows))


if __name__ == "__main__":
    main()
