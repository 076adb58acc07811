"""What balancing costs a training step: the counting pass of a batch-scope loss, and the report of a logged step.

Width 256, 4 layers, 8 experts top-2, 16 rows of 512 tokens in 4 micro-batches, AdamW, on CPU (one thread, its own
seconds) or GPU. Steps with each balance take turns with one that balances nothing; the ratio of medians is the result.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import train
from benchmarks.record import keep
from context.rotary import DefaultRotary
from data.batches import Batch
from model.initialize import initialize
from model.transformer import build_model
from optim.groups import build_optimizer
from parallel.world import World
from run.config import RunConfig, load_config
from run.start import Run

ROOT, VOCAB, ROWS, LENGTH = Path(__file__).parents[1], 512, 16, 512
BALANCES = {
    "nothing": "[]",
    "bias": "[{kind = 'bias'}]",
    "sequence": "[{kind = 'loss', scope = 'sequence'}]",
    "batch": "[{kind = 'loss', scope = 'batch'}]",
}


def config_of(balance: str) -> RunConfig:
    moe = f"{{num_experts = 8, experts_per_token = 2, expert_width = 512, balance = {BALANCES[balance]}}}"
    shape = ["model.width=256", "model.num_layers=4", f"model.moe={moe}", f"tokens_per_step={ROWS * LENGTH}"]
    return load_config(ROOT / "configs/quickstart.toml", [*shape, "optimizer.kind=adamw", "precision=fp32"])


def microbatches_of(count: int) -> list[Batch]:
    size = ROWS // count
    tokens_RT = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return [
        Batch(
            tokens_BT=tokens_RT[first : first + size, :-1],
            labels_BT=tokens_RT[first : first + size, 1:],
            weights_BT=torch.ones(size, LENGTH),
            positions_BT=torch.arange(LENGTH).expand(size, LENGTH),
            places_BT=torch.arange(LENGTH).expand(size, LENGTH),
            lengths=(LENGTH,) * size,
            sources_B=torch.zeros(size, dtype=torch.int64),
            is_real_BT=torch.ones(size, LENGTH, dtype=torch.bool),
            padding_B=torch.zeros(size, dtype=torch.int64),
            rows_B=torch.arange(first, first + size),
            keys_B=torch.arange(first, first + size),
            num_targets=size * LENGTH,
            num_tokens=size * LENGTH,
            num_real=size * LENGTH,
        )
        for first in range(0, ROWS, size)
    ]


def stepper(balance: str, device: torch.device) -> Callable[[], train.StepReport]:
    config = config_of(balance)
    run = Run(config, Path("runs/none"), device, torch.float32, World())
    model = build_model(config.model, VOCAB)
    initialize(model, 0, device)
    model.use_rotary(DefaultRotary(base=10_000.0))
    optimizer, microbatches = build_optimizer(model, config.optimizer), microbatches_of(4)
    return lambda: train.train_step(model, optimizer, microbatches, config.stages.step(0), run)


def measure(rounds: int, device: torch.device) -> list[dict[str, float | str]]:
    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    steps = {balance: stepper(balance, device) for balance in BALANCES}
    taken: dict[str, list[float]] = {name: [] for name in (*BALANCES, "report")}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            marks = [seconds()]
            report = step()
            marks.append(seconds())
            report.routing.report()
            marks.append(seconds())
            if turn > 0:  # the first turn fills caches
                taken[name].append(marks[1] - marks[0])
                taken["report"].append(marks[2] - marks[1])
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return [
        {
            "what": name,
            "device": str(device),
            "seconds": round(median, 5),
            "of_a_step_without": round(median / medians["nothing"], 4),
        }
        for name, median in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/balance.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.rounds, torch.device(arguments.device))
    for row in rows:
        print(row)
    if arguments.keep:
        print(keep("balance", rows))


if __name__ == "__main__":
    main()
