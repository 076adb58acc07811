"""Runs the cases of one test file on gloo ranks, for each size of group in turn: `ranks.py FILE FOLDER SIZE...`.

A case is a function `case_*()` of the file that every rank calls; what it asserts, it asserts after the last exchange.
FOLDER/outcome_SIZE_RANK.json then says for each case "" or what went wrong; the first that fails is the last.
"""

import json
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # what a checkpointed layer would load on each rank anew
import torch.distributed as dist

TIMEOUT = timedelta(seconds=150)


def run_cases(cases: dict[str, Callable[[], None]], rank: int, size: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / f"store_{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    outcomes: dict[str, str] = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case()
        except BaseException:
            outcomes[name] = f"rank {rank} of {size}: {traceback.format_exc()}"
        failed = outcomes.setdefault(name, "") != ""
        (folder / f"outcome_{size}_{rank}.json").write_text(json.dumps(outcomes))
        if failed:
            os._exit(1)  # or the others would wait for what never comes
    dist.barrier()
    dist.destroy_process_group()


def main(file: str, folder: Path, sizes: list[int]) -> None:
    torch.set_num_threads(1)
    cases = {name: case for name, case in runpy.run_path(file).items() if name.startswith("case_")}
    # Forked, so that torch is loaded once; nothing has run yet that a fork would break.
    context = multiprocessing.get_context("fork")
    for size in sizes:
        ranks = [context.Process(target=run_cases, args=(cases, rank, size, folder)) for rank in range(size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(5 * TIMEOUT.seconds)  # other tests may want the same cores; ranks that hang give up by themselves
            rank.kill()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(size) for size in sys.argv[3:]])
