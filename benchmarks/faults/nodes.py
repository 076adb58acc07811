"""Two torchrun agents on one machine, as two nodes that meet by c10d rendezvous: what docs/parallel.md says to run."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.bench import Bench, Outcome
from benchmarks.faults.cases import SAME
from benchmarks.faults.compare import differences, read
from benchmarks.faults.lives import PATIENCE, Start, children, free_port, last_lines
from benchmarks.faults.moments import last_step, newest_checkpoint

Agent = subprocess.Popen[bytes]
ANY_SIZE = ()
"""The layout of these runs: replicas alone, which any number of ranks can be."""
ALONE = "goes on alone, losses within 1e-4"
CLOSE = 1e-4
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""The ranks of each start meet in a store of their own: in torchrun's one (torch 2.13) a rank that is quick finds
the addresses of the start before, and all wait for each other."""
"""How far losses may be apart, as a part of them, once other ranks have added them up."""


def lost_rank_of_a_node(bench: Bench) -> Outcome:
    """A rank of the second of two nodes is killed: both agents start all ranks again, once they have met anew."""
    with bench.fresh(2, ANY_SIZE) as start, _two_nodes(start, "2") as agents:
        _come_to(start, agents, 10)
        _kill(*children(agents[1].pid))
        statuses = _wait(agents)
        problems = [f"ended with {statuses}: {_said(start)}"] if any(statuses) else []
        problems += differences(bench.whole(2, ANY_SIZE)[0].folder, start.folder)
    return Outcome("one rank killed of two nodes, torchrun --nnodes 2", 2, 1, SAME, problems)


def lost_node(bench: Bench) -> Outcome:
    """The second of two nodes fails with its agent: the first goes on alone, from the newest checkpoint."""
    with bench.fresh(2, ANY_SIZE) as start, _two_nodes(start, "1:2") as agents:
        _come_to(start, agents, 10)
        _kill(agents[1].pid, *children(agents[1].pid))
        saved = newest_checkpoint(start.run)
        statuses = _wait(agents[:1])
        problems = [f"ended with {statuses}: {_said(start)}"] if any(statuses) else []
        problems += _close(bench.whole(2, ANY_SIZE)[0].run / "metrics.jsonl", start.run / "metrics.jsonl", saved)
    return Outcome(
        "one node killed of two, torchrun --nnodes 1:2", 2, 1, "goes on on one, losses within 1e-4", problems
    )


def _close(whole: Path, broken: Path, saved: int) -> list[str]:
    """Each step once; losses up to the checkpoint as they were, later ones close."""
    ours, theirs = read(whole), read(broken)
    if [row["step"] for row in ours] != [row.get("step") for row in theirs]:
        return [f"steps {[row.get('step') for row in theirs]}"]
    pairs = [(row["step"], row["loss"], other["loss"]) for row, other in zip(ours, theirs, strict=True)]
    return [
        f"step {step}: loss {loss} -> {other}"
        for step, loss, other in pairs
        if abs(loss - other) > (0.0 if step <= saved else CLOSE * loss)
    ]


@contextlib.contextmanager
def _two_nodes(start: Start, nnodes: str) -> Iterator[list[Agent]]:
    """Two agents with a rank each; the first keeps the store where they meet. None of it outlives the block."""
    _log(start).write_bytes(b"")
    port = free_port()
    agents = [_agent(start, nnodes, port, is_host=True), _agent(start, nnodes, port, is_host=False)]
    try:
        yield agents
    finally:
        for agent in agents:
            if agent.poll() is None:
                _kill(agent.pid, *children(agent.pid))
            agent.wait()


def _agent(start: Start, nnodes: str, port: int, *, is_host: bool) -> Agent:
    """torchrun, as on a node of its own. The first of the names of a machine decides who is host; here all have one."""
    meet = f"is_host={int(is_host)},join_timeout=300,last_call_timeout=5"
    words = ["--nnodes", nnodes, "--nproc-per-node", "1", "--max-restarts", "3", "--local-addr", "127.0.0.1"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "faults"]
    words += ["--rdzv-conf", meet, str(start.root / "train.py"), *start.words]
    environment = {**os.environ, **OWN_STORE, "PYTHONPATH": str(start.root), "OMP_NUM_THREADS": "1"}
    with _log(start).open("ab") as file:
        command = [sys.executable, "-m", "torch.distributed.run", *words]
        return subprocess.Popen(command, cwd=start.folder, env=environment, stdout=file, stderr=file)


def _kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _wait(agents: list[Agent]) -> list[int]:
    return [agent.wait(3 * PATIENCE) for agent in agents]


def _come_to(start: Start, agents: list[Agent], step: int) -> None:
    while last_step(start.run) < step:
        if all(agent.poll() is not None for agent in agents):
            raise RuntimeError(f"the agents ended before step {step}: {_said(start)}")
        time.sleep(0.001)


def _log(start: Start) -> Path:
    return start.folder.with_suffix(".log")


def _said(start: Start) -> str:
    return last_lines(_log(start).read_text(encoding="utf-8", errors="replace"))
