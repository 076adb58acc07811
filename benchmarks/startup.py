"""Seconds a person waits: for `--show`, and for the first step with the corpus made anew or there already."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import keep

ROOT = Path(__file__).parents[1]
ONE_STEP = (
    "log.every_steps=1",
    "total_tokens=4096",
    "context.stages=[{until_tokens = 4096, sequence_length = 128, rotary = {kind = 'default', base = 1e4}}]",
    "optimizer.schedule={kind = 'constant'}",
)


def run(*words: str, folder: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/quickstart.toml"), *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)


def showing(folder: str) -> float:
    begin = time.perf_counter()
    assert run("--show", folder=folder).wait() == 0
    return time.perf_counter() - begin


def first_step(folder: str, name: str) -> float:
    """Until the first row of metrics.jsonl stands there."""
    metrics, begin = Path(folder) / "runs" / name / "metrics.jsonl", time.perf_counter()
    process = run(*ONE_STEP, f"name={name}", folder=folder)
    while not (metrics.exists() and metrics.read_text().count("\n")):
        assert process.poll() is None, "the run ended before its first step"
        time.sleep(0.01)
    seconds = time.perf_counter() - begin
    process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/startup.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        showing(folder)  # fills the file cache
        rows = [
            {"what": "--show, median of 5", "seconds": round(statistics.median(showing(folder) for _ in range(5)), 2)},
            {"what": "first step, corpus prepared anew", "seconds": round(first_step(folder, "cold"), 2)},
            {"what": "first step, corpus prepared before", "seconds": round(first_step(folder, "warm"), 2)},
        ]
    for row in rows:
        print(row)
    if arguments.keep:
        print(keep("startup", rows))


if __name__ == "__main__":
    main()
