"""How long a checkpoint holds a step when files are written in the background, against when it waits for them; and how
long a run that goes on needs to its first step.

Ratios of one run: sizes and the disk are the machine's. Each way to save is timed in turn, and what the second one
writes is on the disk before the next is timed.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import keep
from checkpoint.checkpoints import Checkpoints, CheckpointSettings, read_checkpoint
from settings import Section

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
THREE_STEPS = (
    "log.every_steps=1",
    "total_tokens=12288",
    "context.stages=[{until_tokens = 12288, sequence_length = 128, rotary = {kind = 'default', base = 1e4}}]",
    "optimizer.schedule={kind = 'constant'}",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    "name=resumed",
)


class Nothing(Section):
    """A configuration without keys."""


def experts(millions: int, width: int = 512) -> nn.Module:
    """So many million weights, as a mixture of experts has them: stacks, in layers."""
    model, layer = nn.Module(), 16 * width * 3 * 256
    for number in range(max(1, millions * 10**6 // layer)):
        place = model
        for name in ("blocks", str(number), "feed_forward", "experts"):
            if not hasattr(place, name):
                place.add_module(name, nn.Module())
            place = getattr(place, name)
        place.register_parameter("gate_up", nn.Parameter(torch.randn(16, 512, width)))
        place.register_parameter("down", nn.Parameter(torch.randn(16, width, 256)))
    return model


def saving(millions: int, rounds: int, folder: str) -> list[Row]:
    """Seconds that a step is held, by either way; the first save of each, which makes room, is left out."""
    model = experts(millions)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    ways = {
        name: Checkpoints(
            Path(folder) / name,
            CheckpointSettings(asynchronous=name == "asynchronous", keep=1),
            model,
            [optimizer],
            Nothing(),
            print,
        )
        for name in ("synchronous", "asynchronous")
    }
    seconds: dict[str, list[float]] = {"synchronous": [], "asynchronous": [], "until it is on the disk": []}
    for step in range(rounds + 1):
        for name, checkpoints in ways.items():
            held = timed(lambda: checkpoints.save(step, {"step": step}))  # noqa: B023
            rest = timed(checkpoints.wait)
            if step:
                seconds[name].append(held)
                if name == "asynchronous":
                    seconds["until it is on the disk"].append(held + rest)
    for checkpoints in ways.values():
        checkpoints.close()
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    size = sum(path.stat().st_size for path in (Path(folder) / "asynchronous").rglob("*.safetensors"))
    ratios = [a / s for a, s in zip(seconds["asynchronous"], seconds["synchronous"], strict=True)]
    return [
        {"what": "a checkpoint", "megabytes": round(size / 1e6)},
        *({"what": f"held, {name}", "seconds": round(medians[name], 3)} for name in ("synchronous", "asynchronous")),
        {"what": "asynchronous, until it is on the disk", "seconds": round(medians["until it is on the disk"], 3)},
        {
            "what": "held, asynchronous of synchronous",
            "ratio": round(statistics.median(ratios), 4),
            "largest": round(max(ratios), 4),
            "promised": 0.1,
        },
        {
            "what": "read and verified",
            "seconds": round(timed(lambda: read_checkpoint(Path(folder) / "synchronous")), 3),
        },
    ]


def resuming(folder: str, rounds: int) -> Row:
    """Seconds from the command to the first new row of metrics.jsonl, for the quickstart's model and moments."""
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/quickstart.toml"), *THREE_STEPS]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    run = Path(folder) / "runs/resumed"
    seconds = []
    for _ in range(rounds):
        for step in (2, 3):
            shutil.rmtree(run / f"checkpoints/step_{step:08d}")
        metrics = run / "metrics.jsonl"
        metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        while metrics.read_text().count("\n") < 2:
            if process.poll() is not None:
                raise RuntimeError("the run ended before its first step")
            time.sleep(0.01)
        seconds.append(time.perf_counter() - begin)
        process.wait()
    what = "from the command to the first step of a run that goes on, quickstart"
    return {"what": what, "seconds": round(statistics.median(seconds), 2), "promised": 15}


def timed(act: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=60, help="parameters; three times as many numbers are saved")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/checkpoints.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = saving(arguments.millions, arguments.rounds, folder)
        for row in rows:
            print(row, flush=True)
        rows.append(resuming(folder, min(arguments.rounds, 3)))
    print(rows[-1])
    if arguments.keep:
        print(keep("checkpoints", rows))


if __name__ == "__main__":
    main()
