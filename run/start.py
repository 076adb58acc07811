"""Start-up and ending of a run: ranks, device, precision, the run's folder, signals."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from model.size import Size
from parallel.replicate import World
from run.config import RunConfig
from run.environment import environment
from settings import Refusal, differences, load, to_toml

RUNS = Path("runs")
MAY_CHANGE = ("device", "log.", "checkpoint.", "profile", "threads")
"""Where a run is computed and how it is watched: it may continue under other values of these keys."""


@dataclass
class Run:
    """Where and on what this process runs."""

    config: RunConfig
    folder: Path
    device: torch.device
    dtype: torch.dtype
    world: World
    stop_requested: bool = False
    started: float = field(default_factory=time.monotonic)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of every forward pass: bf16 autocast, or nothing at all in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def say(self, line: str) -> None:
        """One line for the person watching, from the main rank alone."""
        if self.world.is_main:
            print(line, flush=True)

    def should_stop(self) -> bool:
        """Whether some rank was asked to stop; all ranks agree, so that all of them save the same step."""
        return self.world.any(self.stop_requested, self.device)

    def open_folder(self, materials: dict[str, str], size: Size) -> None:
        """Create the run's folder, once nothing is left that could be refused.

        Writes config.toml, environment.json and materials.json (what the data is, by digest). Raises Refusal
        when the data of a run that continues is not what it was.
        """
        if self.world.is_main:
            recorded = self.folder / "materials.json"
            if recorded.exists():
                _refuse_other_materials(json.loads(recorded.read_text()), materials, self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.toml").write_text(to_toml(self.config))
            recorded.write_text(json.dumps(materials, indent=2) + "\n")
            around = {
                **environment(self.device, self.dtype, self.world.size),
                "parameters": {"total": size.total, "active": size.active},
            }
            (self.folder / "environment.json").write_text(json.dumps(around, indent=2) + "\n")
        self.world.wait()

    def finish(self) -> None:
        """Leave the process group; all ranks arrive before one of them goes."""
        if self.world.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def start(config: RunConfig, *, fresh: bool = False) -> Run:
    """Join the ranks, choose device and precision, find the run's folder. Nothing is written yet.

    Raises Refusal for a device or precision that is not there, and for a folder of another configuration.
    """
    device = choose_device(config.device)
    world = join_ranks(device)
    if device.type == "cuda":
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.threads or max(1, cores // ranks_here))
    torch.manual_seed(config.seed)
    run = Run(config, choose_folder(config, fresh), device, choose_dtype(config.precision, device), world)
    _stop_on_signals(run)
    return run


def join_ranks(device: torch.device) -> World:
    """The ranks that torchrun started, over NCCL on GPUs and gloo on CPUs; a world of one without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise Refusal(f"{torch.cuda.device_count()} GPUs here cannot hold local rank {local_rank}; start fewer ranks")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), size, local_rank)


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; a device asked for by name is never replaced."""
    if name == "cuda" and not torch.cuda.is_available():
        raise Refusal('device="cuda": torch finds no NVIDIA GPU here; use device="auto" or device="cpu"')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies it faster than fp32, else fp32."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_has_amx() else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def choose_folder(config: RunConfig, fresh: bool) -> Path:
    """runs/<name>, continued when it holds this configuration; with `fresh` the next free runs/<name>-<number>."""
    folder = RUNS / config.name
    if fresh:
        number = 2
        while folder.exists():
            folder, number = RUNS / f"{config.name}-{number}", number + 1
        return folder
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    recorded = folder / "config.toml"
    if not recorded.exists():
        raise Refusal(f"{folder}: is not empty and holds no config.toml, so it is no run; choose another name=...")
    changed = differences(load(recorded, [], RunConfig), config)
    changed = [line for line in changed if not line.startswith(MAY_CHANGE)]
    if changed:
        listed = "\n  ".join(changed[:8] + ([f"and {len(changed) - 8} more"] if len(changed) > 8 else []))
        raise Refusal(
            f"{folder}: holds a run of another configuration:\n  {listed}\n"
            f"use --fresh to start anew beside it, or name=... for a run of its own"
        )
    return folder


def refusing(entry: Callable[[], None]) -> int:
    """Run an entry point; a refusal becomes one message and exit status 2."""
    try:
        entry()
    except Refusal as refusal:
        if os.environ.get("RANK", "0") == "0":
            print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def _stop_on_signals(run: Run) -> None:
    def request(number: int, _frame: FrameType | None) -> None:
        if run.stop_requested:  # asked twice: the person does not want to wait for the step
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        run.stop_requested = True

    signal.signal(signal.SIGTERM, request)
    signal.signal(signal.SIGINT, request)


def _refuse_other_materials(before: dict[str, str], now: dict[str, str], folder: Path) -> None:
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        raise Refusal(
            f"{folder}: cannot continue, its data has changed: {', '.join(sorted(changed))}; "
            f"put the old data back, or use --fresh to start anew"
        )


def _cpu_has_amx() -> bool:
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(check is not None and check())
