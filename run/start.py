"""Start-up and ending of a run: ranks, device, precision, the run's folder, signals."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from checkpoint.writing import settle
from context.stages import Stage
from evals.ranks import Ranks
from model.block import Kind
from model.size import Size
from moe.words import routing_in_words
from parallel.layout import Layouts
from parallel.mesh import Grid, Mesh, build_mesh
from parallel.sequence import ALONE, RowGroup, build_row_groups
from parallel.whole import is_in_parts
from parallel.world import World
from run.branch import Origin
from run.config import RunConfig
from run.deterministic import fix_order, forbidden
from run.environment import environment
from run.folder import RUNS, choose_name, describe, described, has_progress, hold, let_go, refuse_other_run
from run.guard import Guard
from run.peak import NOT_KNOWN, Peak, peak_of, remembered
from run.watchdog import Watchdog
from settings import Refusal

NAMELESS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}
"""What writing to an open file may end with: the file system's errors that name no path."""


MOST_OF_A_LINE = 1500
"""Letters of a line of a message: a value may be as long as a file."""


@dataclass
class Run:
    """Where and on what this process runs."""

    config: RunConfig
    folder: Path
    device: torch.device
    dtype: torch.dtype
    world: World
    row_group: RowGroup = ALONE
    """The ranks that this one holds rows together with, in the stage that was entered last."""
    row_groups: dict[int, RowGroup] = field(default_factory=lambda: {1: ALONE})
    """By size, those of all stages."""
    mesh: Mesh = field(default=None)  # type: ignore[assignment]  # set below
    """Who shares what, `world` being all ranks of it; left out, all of them hold the same."""
    layouts: Layouts = field(default_factory=dict)
    """How the model lies on them, once it does."""
    kinds: dict[int, Sequence[Kind]] = field(default_factory=dict)
    """By stage, what of each layer is computed again, where a memory budget decides it."""
    peak: Peak = NOT_KNOWN
    """Of this rank's device, once the folder is open; the main rank's alone."""
    guard: Guard = field(init=False)
    """Which steps may change the weights."""
    watchdog: Watchdog = field(init=False)
    """What ends this rank where it stands still."""
    stop_requested: bool = False
    """Whether this rank has a reason to end the run after the step that it is in."""

    def __post_init__(self) -> None:
        self.watchdog = Watchdog(self.config.watchdog, self.world.rank)
        self.guard = Guard(self.config.guard, self.world, self.watchdog)
        self.mesh = self.mesh or Mesh(Grid(self.world.size), self.world, {})

    @property
    def groups(self) -> World:
        """The ranks that take rows of their own: of those that hold rows together, all count as one."""
        return self.row_group.groups(self.mesh.data)

    def num_groups(self, stage: Stage) -> int:
        """How many groups of ranks take rows of their own in this stage."""
        return self.mesh.grid.data // self.config.row_ranks(stage)

    @property
    def askers(self) -> Ranks:
        """The ranks that share out what evaluations read: those that only hold experts together read the same."""
        return Ranks(self.world, 1 if is_in_parts(self.mesh) else self.config.parallel.expert)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of every forward pass: bf16 autocast, or nothing at all in fp32."""
        self.watchdog.beat()  # whoever computes comes by here
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

    def open_folder(self, materials: dict[str, str], size: Size, origin: Origin | None = None) -> None:
        """Create the run's folder and hold it, once nothing is left that could be refused.

        origin: of a branch that begins, written down in environment.json.
        From here on SIGTERM and SIGINT ask the run to save and stop. Raises Refusal when another process trains in
        the folder, when it has been taken since, and when the data of a run that continues is not what it was.
        """
        if self.world.is_main:
            hold(self.folder)
            refuse_other_run(self.folder, self.config)  # again, as nobody held it while the data was prepared
            around = {
                **environment(self.device, self.dtype, self.world.size),
                "parameters": {"total": size.total, "active": size.active},
                "routing": routing_in_words(self.config.model.routed),
                **(origin.facts() if origin else {}),
            }
            before = described(self.folder) if has_progress(self.folder) else {}
            self.peak = remembered(before, around) or peak_of(self.device, self.dtype)
            around |= self.peak.facts
            describe(self.folder, self.config, materials, around)
        self.world.wait()
        _stop_on_signals(self)
        self.watchdog.start(self.folder)

    def finish(self) -> None:
        """Let go of the folder and leave the process group; all ranks arrive before one of them goes."""
        self.world.wait()
        self.watchdog.stop()
        if self.world.is_main:
            let_go(self.folder)
        if self.world.size > 1:
            dist.destroy_process_group()


def start(config: RunConfig, *, fresh: bool = False) -> Run:
    """Join the ranks, choose device and precision, find the run's folder. Nothing is written yet.

    The run's name in its configuration becomes that of the folder. Raises Refusal for a device or precision that is
    not there, and for a folder of another configuration.
    """
    settle()
    fix_order(config.deterministic)
    device = choose_device(config.device)
    world = join_ranks(device, config.watchdog.timeout)
    if device.type == "cuda":
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    mesh = build_mesh(config.parallel, config.all_row_ranks, world, device)
    row_groups = build_row_groups(config.parallel.sequence, config.all_row_ranks, mesh)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.threads or max(1, cores // ranks_here))
    torch.manual_seed(config.seed)
    config = config.model_copy(update={"name": choose_name(config, fresh)})
    dtype, row_group = choose_dtype(config.precision, device), row_groups[config.row_ranks(config.stages[0])]
    return Run(config, RUNS / config.name, device, dtype, world, row_group, row_groups, mesh)


def join_ranks(device: torch.device, timeout: timedelta | None) -> World:
    """The ranks that torchrun started, over NCCL on GPUs and gloo on CPUs; a world of one without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise Refusal(f"{torch.cuda.device_count()} GPUs here cannot hold local rank {local_rank}; start fewer ranks")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store_of_start(timeout), rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, local_rank)


def store_of_start(timeout: timedelta | None) -> dist.Store | None:
    """Where the ranks meet; None: as torch has it.

    torchrun keeps one store for all its starts, and there a quick rank finds the addresses of the start before and
    waits for ranks that are gone (seen with torch 2.13). Each start of one agent gets keys of its own here; several
    agents may count their starts differently, so docs/parallel.md has them turn that store off.
    """
    is_alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not is_alone:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timeout or timedelta(minutes=30)
    store = dist.TCPStore(address, port, int(os.environ["WORLD_SIZE"]), is_master=False, timeout=patience)
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


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


def refusing(entry: Callable[[], None]) -> int:
    """Run an entry point; a refusal, or a file system that refuses, becomes one message and exit status 2.

    Every rank that refuses says so, as the others may not know. Ctrl-C ends with status 130.
    """
    try:
        entry()
    except Refusal as refusal:
        _complain(f"refused: {refusal}")
        return 2
    except BrokenPipeError:  # whoever read our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None and error.errno not in NAMELESS:
            raise
        place = error.filename if error.filename is not None else "a file of this run"
        _complain(f"refused: {place}: {error.strerror}; mend that and start the same command again")
        return 2
    except RuntimeError as error:
        said = forbidden(error)
        if said is None:
            raise
        _complain(f"refused: {said}")
        return 2
    except KeyboardInterrupt:
        _complain("interrupted; the same command starts it again, from its last checkpoint where there is one")
        return 130
    except SystemExit as end:  # another rank has said why
        return end.code if isinstance(end.code, int) else 1
    return 0


def leave(status: int) -> NoReturn:
    """End this process with a status, a rank among several at once.

    A thread of torch's that asks for the interpreter while it is taken down would abort the rank instead.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    settle()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _complain(line: str) -> None:
    rank = f"rank {os.environ.get('RANK', '0')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    # A file, or whoever wrote it, may not tell a terminal what to do, nor fill it.
    shown = "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in line)
    lines = [told if len(told) <= MOST_OF_A_LINE else f"{told[:MOST_OF_A_LINE]}..." for told in shown.split("\n")]
    text = "\n".join(lines)
    print(f"{rank}{text}", file=sys.stderr, flush=True)


def _stop_on_signals(run: Run) -> None:
    asked: set[int] = set()

    def request(number: int, _frame: FrameType | None) -> None:
        if asked:  # twice: the person does not want to wait for the step
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        asked.add(number)
        run.stop_requested = True

    signal.signal(signal.SIGTERM, request)
    signal.signal(signal.SIGINT, request)


def _cpu_has_amx() -> bool:
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(check is not None and check())
