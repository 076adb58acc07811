"""Whole runs whose ranks hold rows together: every shipped configuration trains, and a run goes on in another cut."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import train
from parallel.world import World
from run import record, start
from run.config import RunConfig, load_config, show
from run.record import StepReport
from run.start import refusing
from tests.words import write_words

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parents[1] / "tiny.toml"
FOLDER = ROOT / "configs" / "context"
# Less data, a smaller model, shorter rows and fewer steps than in the file; what the file is about stays.
SMALL = (
    "total_tokens=6144",
    "tokens_per_step=512",
    "device=cpu",
    "precision=fp32",
    "threads=1",
    "model.width=32",
    "context.stages.0.until_tokens=5120",
    "context.stages.0.sequence_length=128",
    "context.stages.1.until_tokens=6144",
    "context.stages.1.sequence_length=512",
    "context.stages.1.learning_rate.warmup_tokens=512",
    "data.sources.python={kind = 'text', path = 'words.txt', held_out = 0.1}",
    "optimizer.schedule.warmup_tokens=512",
    "evals={tasks = []}",
    "log={every_steps = 1, tensorboard = false}",
)
NO_EVALS = "evals={tasks = []}"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


def assert_same_numbers(ours: str, theirs: str, tolerance: float = 1e-5) -> None:
    assert [row["step"] for row in rows(ours)] == [row["step"] for row in rows(theirs)]
    for row, expected in zip(rows(ours), rows(theirs), strict=True):
        for key in ("loss", "balance_loss", "router_z_loss", "router_entropy", "bits_per_byte", "flops_per_token"):
            assert row[key] == pytest.approx(expected[key], rel=tolerance), (key, row["step"])
        assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=10 * tolerance)
        for key in ("max_violation", "dead_experts", "documents", "learning_rate", "padding_share"):
            assert row[key] == pytest.approx(expected[key], abs=1e-6), (key, row["step"])
        assert row["distances"] == expected["distances"] and row["distances"][0] > 0, row["step"]


@contextmanager
def as_started() -> Iterator[None]:
    """`train.main` on the ranks that are already here, in a folder that they share."""
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank())
    replaced = {
        (start, "join_ranks"): lambda device, timeout: world,
        (dist, "destroy_process_group"): lambda: None,
        (record, "write_report"): lambda folder: folder,
    }
    kept = {place: getattr(*place) for place in replaced}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for (module, name), value in replaced.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in kept.items():
            setattr(module, name, value)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@cache
def a_shared_folder() -> None:
    folder = Path(f"runs_of_{dist.get_world_size()}")
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    os.chdir(folder)
    if dist.get_rank() == 0:
        write_words(Path())
    dist.barrier()


def run_main(config: RunConfig) -> None:
    a_shared_folder()
    with as_started():
        train.main(config)
    dist.barrier()


def case_every_configuration_trains() -> None:
    """And those of one model give the same numbers, however its rows are held."""
    mine = sorted(FOLDER.glob(f"*_{dist.get_world_size()}.toml"))
    assert len(mine) >= 3
    expected = None
    for path in mine:
        config = load_config(path, [*SMALL])
        run_main(config)
        losses = [row["loss"] for row in rows(path.stem)]
        assert len(losses) == 12 and rows(path.stem)[-1]["sequence_length"] == 512
        assert max(losses[9:]) < losses[0] - 0.5, losses
        if config.model.attention.kind == "grouped":
            assert losses == pytest.approx(expected or losses, rel=1e-3), path.stem
            expected = losses


def case_a_run_that_broke_off_goes_on_in_another_cut() -> None:
    """Held together by all ranks, then by none, then by pairs."""
    settings = ["tokens_per_microbatch=128", NO_EVALS, "checkpoint.every_steps=2"]
    run_main(load_config(TINY, ["name=whole", *settings]))
    for context, steps in ((dist.get_world_size(), 5), (1, 3), (2, 100)):
        broken_off_after(steps, load_config(TINY, ["name=broken", *settings, f"parallel.context={context}"]))
    assert_same_numbers("broken", "whole", tolerance=2e-5)


def broken_off_after(steps: int, config: RunConfig) -> None:
    """A run that falls over when it has taken so many steps, unless it ends before."""
    whole, calls = train.train_step, iter(range(1000))

    def falling(*arguments: Any) -> StepReport:
        if next(calls) == steps:
            raise KeyboardInterrupt("the power failed")
        return whole(*arguments)

    train.train_step = falling
    try:
        run_main(config)
    except KeyboardInterrupt:
        dist.barrier()
    finally:
        train.train_step = whole


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "write_report", lambda folder: folder)
    write_words(Path())
    return tmp_path


def start_ranks(size: int, *overrides: str) -> list[subprocess.Popen[str]]:
    """A run of so many ranks, each a process that can be killed by itself; what torchrun starts outlives it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), str(TINY), *overrides]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


@pytest.mark.distributed
def test_ranks_that_were_killed_leave_a_run_that_one_process_finishes(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    longer = (NO_EVALS, "checkpoint.every_steps=2", "total_tokens=20480", "context.stages.1.until_tokens=20480")
    ranks = start_ranks(2, *longer, "name=killed", "parallel.context=2")
    end = time.monotonic() + 120
    saved = here / "runs/killed/checkpoints/step_00000004"
    while time.monotonic() < end and ranks[0].poll() is None and not saved.exists():
        time.sleep(0.01)
    for process in ranks:
        process.kill()
    said, _ = (process.communicate()[0] for process in ranks)
    assert [process.returncode for process in ranks] == [-signal.SIGKILL] * 2, said
    assert "full layers by groupcast(" in said and "work: 1.0" in said
    train.main(load_config(TINY, [*longer, "name=killed", "parallel.context=1"]))
    assert "runs/killed: continues at step" in capsys.readouterr().out
    train.main(load_config(TINY, [*longer, "name=whole"]))
    assert_same_numbers("killed", "whole", tolerance=1e-4)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_ranks_that_do_not_divide_are_refused_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusing(lambda: train.main(load_config(TINY, ["name=refused", "parallel.context=2"]))) == 2
    assert "refused: parallel.context=2 does not divide the 1 ranks of this run; start 2" in capsys.readouterr().err
    assert not Path("runs/refused").exists()


def test_what_a_run_would_cost_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show(load_config(FOLDER / "usp_4.toml", []))
    shown = capsys.readouterr().out
    for stage in (0, 1):
        assert f"# stage {stage}, full layers by usp, layout balanced:" in shown
        assert f"# stage {stage}, window layers by groupcast, layout balanced:" in shown
    assert "# " in shown and "4 ranks x 1,024 tokens: 1 document in 1 row" in shown
    assert "most over mean" in shown and "sent by a rank forward" in shown
    assert shown.count("#   usp (ulysses of 2): at most") == 2, "of full layers alone"
    show(load_config(FOLDER / "base.toml", []))
    assert "ranks" not in capsys.readouterr().out


def test_every_method_and_layout_has_a_configuration() -> None:
    found = [load_config(path, []).parallel for path in FOLDER.glob("*_[24].toml")]
    methods = {name for parallel in found for name in (parallel.sequence.full, parallel.sequence.window)}
    assert methods == {"ring", "gather", "groupcast", "ulysses", "usp"}
    assert {parallel.context for parallel in found} == {2, 4} and {parallel.expert for parallel in found} == {1, 2}
    for path in FOLDER.glob("*_[24].toml"):
        assert load_config(path, []).parallel.context == int(path.stem[-1])
