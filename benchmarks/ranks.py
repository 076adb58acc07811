"""Two ranks that share a model's weights against one that has them whole: `python -m benchmarks.ranks`.

The same step of the same mixture of experts on the same tokens: by rank 0 alone with one thread while rank 1 sleeps,
then by both with one thread each, every layer's weights cut in two (FSDP2) or replicated. They take turns in one
process, so that a change in the machine's load hits both; the ratio of the medians is the result. MFU is against the
measured peak of one thread for each rank that works (see docs/planning.md); rows are whole, without padding.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from attention.attention import AttentionSettings
from attention.mask import Documents, Mask
from benchmarks.record import keep
from context.rotary import DefaultRotary
from model.initialize import first_values
from model.loss import cross_entropy
from model.size import flops_per_token
from model.transformer import ModelSettings, Transformer, build_model
from moe.layer import MoESettings
from moe.words import routing_in_words
from optim.groups import AdamWSettings, build_optimizer
from parallel.apply import parallelize
from parallel.gradients import clip_gradients, named_parameters, norm_over_ranks, sum_gradients
from parallel.mesh import ParallelSettings, build_mesh
from parallel.recompute import RecomputeSettings
from parallel.whole import fill
from parallel.world import World
from run.peak import peak_of
from run.speed import utilization

VOCAB, ROWS, LENGTH = 512, 16, 512
MOE = MoESettings(num_experts=8, experts_per_token=2, expert_width=512)
SETTINGS = ModelSettings(num_layers=4, width=256, attention=AttentionSettings(num_heads=4, num_kv_heads=2), moe=MOE)
WAYS = {"one rank": ParallelSettings(), "two replicas": ParallelSettings(), "two shards": ParallelSettings(shard=2)}


class Asked(NamedTuple):
    """Of `parallelize`."""

    parallel: ParallelSettings
    recompute: RecomputeSettings = "none"
    offload: bool = False
    compile: bool = False


Step = Callable[[], None]


def stepper(world: World, settings: ParallelSettings) -> Step:
    """One whole optimizer step on this rank's rows of the same tokens."""
    device = torch.device("cpu")
    mesh = build_mesh(settings, {}, world, device)
    model = build_model(SETTINGS, VOCAB)
    layouts = parallelize(model, mesh, Asked(settings), device)
    fill(model, device, mesh, layouts, lambda name, shape: first_values(name, shape, SETTINGS, 0))
    model.use_rotary(DefaultRotary(base=10_000.0))
    optimizer = build_optimizer(model, AdamWSettings(learning_rate=1e-3))
    tokens_BT = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    own_BT = tokens_BT.chunk(world.size)[world.rank]

    def step() -> None:
        optimizer.zero_grad()
        (loss_of(model, own_BT) / tokens_BT.numel()).backward()
        parameters = named_parameters(model)
        sum_gradients(parameters, layouts, mesh)
        clip_gradients(optimizer.parameters, norm_over_ranks(parameters, layouts, mesh), optimizer.clip)
        optimizer.step()

    return step


def loss_of(model: Transformer, tokens_BT: torch.Tensor) -> torch.Tensor:
    hidden_BTD, _ = model(tokens_BT, None, Mask(documents=Documents((LENGTH,) * len(tokens_BT))))
    return cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, tokens_BT.flatten(), None, 4096).weighted


def measure(rounds: int) -> list[dict[str, Any]]:
    """On rank 0; the others take part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    steps = {
        name: stepper(World() if name == "one rank" else World(rank, size), way)
        for name, way in WAYS.items()
        if rank == 0 or name != "one rank"
    }
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds + 1):
        for name in WAYS:
            dist.barrier()
            begin = time.perf_counter()
            if name in steps:
                steps[name]()
            dist.barrier()
            if turn > 0:  # the first turn fills caches
                seconds[name].append(time.perf_counter() - begin)
    dist.destroy_process_group()
    speed = {name: ROWS * LENGTH / statistics.median(times) for name, times in seconds.items()}
    if rank:
        return []
    peak, flops = peak_of(torch.device("cpu"), torch.float32), flops_per_token(SETTINGS, VOCAB, LENGTH)
    around = {**peak.facts, "routing": routing_in_words(MOE), "padding_share": 0.0}
    return [
        {
            "way": name,
            "tokens_per_second": round(each),
            "ratio": round(each / speed["one rank"], 2),
            "mfu": utilization(each, flops, peak.flops, 1 if name == "one rank" else size),
            "flops_per_token": flops,
            **around,
        }
        for name, each in speed.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/ranks.json")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "benchmarks.ranks"]
        sys.exit(subprocess.run([*words, *sys.argv[1:]], check=False).returncode)
    rows = measure(arguments.rounds)
    for row in rows:
        print(row, flush=True)
    if arguments.keep and rows:
        print(keep("ranks", rows))


if __name__ == "__main__":
    main()
