"""Attention, forward and backward: our backends against other people's functions, and what splitting over ranks costs.

    python -m benchmarks.attention                     all of it at this device's sizes, at most 8 minutes
    python -m benchmarks.attention --keep              and write benchmarks/results/attention-<device>.json
    python -m benchmarks.attention --only ranks        virtual ranks in one process, against the single backend
    python -m benchmarks.attention --only processes    on a CPU: 2 gloo ranks, against one and against ringmaster

Each entrant's error is measured first, on a slice of the tokens in fp64. Then entrants take turns, so that a change in
the machine's load hits all of them. On a CPU a round is timed in processor time with one thread, on a GPU between CUDA
events; the median of the rounds counts. A rate counts the visible pairs alone, 4 * pairs * heads * channels operations
forward and 2.5 times as many backward. ringmaster is axolotl-ringmaster 0.2.7 and takes part where it can be imported:
pip install --target DIR --no-deps axolotl-ringmaster==0.2.7, and DIR on PYTHONPATH.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import attention_ranks
from benchmarks.attention_rivals import HEADS, MASKS, Entrant, Problem, entrants, on_slice
from benchmarks.moe import Row, device_slug, relative
from benchmarks.record import keep

SLICE = 64
"""Tokens on which errors are measured."""
LENGTHS = {"cuda": (1024, 4096, 16384, 32768, 131072), "cpu": (1024, 4096)}
BACKWARD = 2.5
"""Products of a backward pass for each of a forward pass: 5 for 2."""


@dataclass
class Entry:
    """One that takes part, and what is known of it."""

    name: str
    entrant: Entrant
    facts: Row
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    """Milliseconds."""

    @property
    def spent(self) -> float:
        return (sum(self.forward) + sum(self.backward)) / 1e3


def milliseconds(work: Callable[[], object], is_cuda: bool) -> float:
    if is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return (clock() - start) * 1e3


def enter(name: str, build: Callable[[], Entrant], problem: Problem, truth: tuple[Tensor | None, ...]) -> Entry | Row:
    """The entrant with its errors and its memory, compiled and warm; or a row that says why it does not take part."""
    try:
        entrant = build()
        out, gradients = entrant.forward(), entrant.backward()
        facts: Row = {
            name: float(f"{relative(sliced(ours, problem, name), exact):.1e}")
            for name, ours, exact in zip(("out", "dq", "dk", "dv"), (out, *gradients), truth, strict=True)
            if exact is not None
        }
        del out, gradients
        if problem.is_cuda:
            facts["peak_gibibytes"] = peak(entrant)
    except Exception as failure:  # what other people's code may raise is theirs to choose
        text = str(failure).strip().partition("\n")[0][:160]
        return {
            "entrant": name,
            "note": text if isinstance(failure, ValueError) else f"{type(failure).__name__}: {text}",
        }
    return Entry(name, entrant, facts)


def sliced(x_1NHC: Tensor, problem: Problem, name: str) -> Tensor:
    """The same part of a result as `on_slice` computes."""
    if name in {"dk", "dv"}:
        return x_1NHC[0, -SLICE:, 0]
    return x_1NHC[0, -SLICE:, : problem.heads.queries // problem.heads.keys]


def peak(entrant: Entrant) -> float:
    """GiB of a forward and backward pass at their highest, beyond what was there before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    entrant.forward()
    entrant.backward()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)


def measure(problem: Problem, rounds: int, budget: float, deadline: float) -> list[Row]:
    """A row for each; `budget` are the seconds that one of them may take in all its rounds."""
    truth, marks, entered = on_slice(problem, SLICE), {}, []
    for name, is_auto, build in entrants(problem):
        is_over = time.monotonic() > deadline
        entered.append({"entrant": name, "note": TIME_UP} if is_over else enter(name, build, problem, truth))
        marks[name] = {"auto": True} if is_auto else {}
    entries = [entry for entry in entered if isinstance(entry, Entry)]
    for _ in range(rounds):
        for entry in entries:
            if not entry.forward or (entry.spent < budget and time.monotonic() < deadline):
                entry.forward.append(milliseconds(entry.entrant.forward, problem.is_cuda))
                entry.backward.append(milliseconds(entry.entrant.backward, problem.is_cuda))
    rows = [entry if isinstance(entry, dict) else row_of(entry, problem) for entry in entered]
    around = {"mask": problem.mask_name, "length": problem.length, "dtype": str(problem.q_1TGC.dtype)[6:]}
    return [{**around, **row, **marks[row["entrant"]]} for row in rows]


TIME_UP = "not measured: the time was up"


def row_of(entry: Entry, problem: Problem) -> Row:
    forward, backward = statistics.median(entry.forward), statistics.median(entry.backward)
    return {
        "entrant": entry.name,
        "forward_ms": round(forward, 3),
        "backward_ms": round(backward, 3),
        "forward_tflops": round(problem.flops / forward / 1e9, 3),
        "backward_tflops": round(BACKWARD * problem.flops / backward / 1e9, 3),
        "rounds": len(entry.forward),
        **entry.facts,
    }


def show(title: str, rows: list[Row], around: tuple[str, ...]) -> None:
    """A table of all columns that any row has, but for those that the title tells."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in around]
    columns.sort(key=lambda name: name == "note")
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*("" if row.get(column) is None else str(row[column]) for column in columns))
    Console(width=200).print(table)


def compare(device: str, arguments: argparse.Namespace) -> list[Row]:
    """Every mask at every length, all entrants on one device."""
    rows: list[Row] = []
    for length in arguments.lengths:
        for mask in arguments.masks:
            problem = Problem.make(mask, length, HEADS[device], getattr(torch, arguments.dtype), device)
            own = measure(problem, arguments.rounds, arguments.budget, arguments.deadline)
            show(f"{mask}, {length} tokens, {arguments.dtype}", own, ("mask", "length", "dtype"))
            rows += own
            del problem
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sections = ("backends", "ranks", "processes")
    parser.add_argument("--only", choices=sections, help="one of the three parts")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS[device])
    parser.add_argument("--masks", nargs="+", default=MASKS, choices=MASKS)
    parser.add_argument("--dtype", default={"cuda": "bfloat16", "cpu": "float32"}[device])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds one entrant may take in all its rounds")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is measured")
    parser.add_argument("--ranks", nargs="+", type=int, default=attention_ranks.VIRTUAL[device], help="virtual ranks")
    parser.add_argument("--share", type=int, default=attention_ranks.SHARE[device], help="tokens of a virtual rank")
    parser.add_argument("--split-length", type=int, default=8192, help="tokens over 2 processes")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/attention-<device>.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.deadline = time.monotonic() + 60 * arguments.minutes
    wanted = sections if arguments.only is None else (arguments.only,)
    rows: list[Row] = []
    # What is cheap comes first: the longest sequences may use up the time.
    if "processes" in wanted and device == "cpu":
        own = attention_ranks.processes(arguments.split_length, arguments.rounds)
        show(f"{arguments.split_length} tokens, 8 documents, fp32, gloo", own, ())
        rows += own
    if "ranks" in wanted:
        own = attention_ranks.virtual(device, arguments)
        show(f"virtual ranks of {arguments.share} tokens each, against one call", own, ())
        rows += own
    if "backends" in wanted:
        rows += compare(device, arguments)
    if arguments.keep:
        print(keep(f"attention-{device_slug(device)}", rows))


if __name__ == "__main__":
    main()
