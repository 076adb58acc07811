"""Everything that has to be seen on a GPU, in one command: checks first, then every number that the docs leave open.

    python -m benchmarks.gpu runs/gpu                  all of it, about an hour on one H200; stop it whenever you like
    python -m benchmarks.gpu runs/gpu --minutes 9      begin nothing that would not end by then; call again for the rest
    python -m benchmarks.gpu --list                    what would run, and for how long

Each step is a command of its own: what it printed lies in the folder as NAME.log, its status and seconds in
steps.json, and what benchmarks keep in benchmarks/results/. A step that failed does not stop the others; it is tried
again by the next call.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from run.files import write_whole
from run.start import refusing
from settings import Refusal

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
KERNELS = ("tests/attention/kernels", "tests/attention/backends", "tests/moe/kernels")
COMPARISON = "configs/compare/dense_moe_h200.toml"


@dataclass(frozen=True)
class Step:
    """One command, and the most minutes that it may take."""

    name: str
    words: tuple[str, ...]
    minutes: float


def steps(text: str | None) -> list[Step]:
    """In order of what everything after rests on. text: shards for the comparison, which is left out without."""
    module = (PYTHON, "-m")
    found = [
        Step("doctor", (*module, "run", "doctor"), 1),
        Step("tests", (*module, "pytest", "-q", "-m", "gpu", "tests"), 9),
        Step("kernels", (*module, "pytest", "-q", *KERNELS), 9),
        Step("quickstart", (PYTHON, "train.py", "configs/quickstart.toml", "name=gpu-quickstart"), 6),
        Step("product", (*module, "benchmarks.kernels", "--sweep"), 9),
        Step("attention_tiles", (*module, "benchmarks.attention_kernels", "--sweep"), 9),
        Step("attention", (*module, "benchmarks.attention", "--keep"), 9),
        Step("moe", (*module, "benchmarks.moe", "--keep"), 9),
        Step("step", (*module, "benchmarks.step", "--precision", "float32", "bfloat16", "--keep"), 4),
        Step("checkpoints", (*module, "benchmarks.checkpoints", "--keep"), 6),
    ]
    if text is not None:
        path = json.dumps(str(Path(text).resolve()))
        shards = f'every.data.sources.text={{ kind = "shards", path = {path}, weight = 0.9 }}'
        found.append(Step("compare", (PYTHON, "compare.py", COMPARISON, shards), 60))
    return found


def main(arguments: argparse.Namespace) -> None:
    """Run what has not succeeded yet; raises Refusal without a GPU, and in the end where steps have failed."""
    chosen = [step for step in steps(arguments.text) if step.name in (arguments.only or [step.name])]
    if arguments.list:
        for step in chosen:
            print(f"{step.name:<16} {step.minutes:>4g} min  {' '.join(step.words[1:])}")
        return
    if not torch.cuda.is_available():
        raise Refusal(
            "benchmarks.gpu: this machine has no CUDA device; `python -m run doctor` says why (--list: what runs)"
        )
    failed = run(chosen, arguments.folder, arguments.minutes)
    if failed:
        raise Refusal(f"{', '.join(failed)} failed; {arguments.folder}/NAME.log says how, the same command tries again")


def run(chosen: list[Step], folder: Path, minutes: float | None) -> list[str]:
    """Names of the steps that failed; those that ended well before are not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    state, limit = folder / "steps.json", 60 * minutes if minutes is not None else math.inf
    done: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {}
    begin, failed = time.monotonic(), []
    for step in chosen:
        if done.get(step.name, {}).get("status") == 0:
            continue
        left = limit - (time.monotonic() - begin)
        if min(60 * step.minutes, limit) > left + 1:
            print(f"{step.name}: {left / 60:.1f} minutes are left, too few for its {step.minutes:g}; call again")
            break
        print(f"{step.name} ...", flush=True)
        done[step.name] = attempt(step, folder, left)
        write_whole(state, json.dumps(done, indent=1).encode())
        print(f"{step.name}: status {done[step.name]['status']} in {done[step.name]['seconds']:.0f} s", flush=True)
        if done[step.name]["status"] != 0:
            failed.append(step.name)
    return failed


def attempt(step: Step, folder: Path, left: float) -> dict[str, Any]:
    """Its status (124: it ran past its time and was asked to stop) and seconds."""
    since = time.monotonic()
    with (folder / f"{step.name}.log").open("wb") as log:
        process = subprocess.Popen(step.words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = process.wait(timeout=min(60 * step.minutes, left))
        except subprocess.TimeoutExpired:
            process.terminate()  # a run saves where it is, and goes on from there
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
            status = 124
    return {"status": status, "seconds": time.monotonic() - since}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/gpu"), help="where logs lie")
    parser.add_argument("--minutes", type=float, help="after which this call ends")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the steps that --list names")
    parser.add_argument("--text", help="shards of bytes, by `python -m data prepare`, to compare dense and MoE on")
    parser.add_argument("--list", action="store_true", help="say what would run")
    return parser.parse_args()


if __name__ == "__main__":
    asked = parse_arguments()
    sys.exit(refusing(lambda: main(asked)))
