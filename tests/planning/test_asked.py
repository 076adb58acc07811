"""What evaluations are said to need: keys and values of the longest prompt, a forward pass, a copy of a cut model."""

from pathlib import Path

import pytest
import torch

from attention.cache import Room
from model.cache_bytes import cache_bytes
from model.kept import Numbers
from model.transformer import build_model
from planning.asked import TOKENS, Asked, asked_of
from planning.device import Device
from planning.forecast import forecasts, whole_rows
from planning.outlook import memory_rows
from run.config import load_config

TINY = Path(__file__).parents[1] / "tiny.toml"
NUMBERS = Numbers(4, "cpu")
DEVICE = Device("cpu", "a machine", torch.float32, 1e12, 2**20)


def asked(*overrides: str, ranks: int = 1) -> Asked | None:
    return asked_of(load_config(TINY, list(overrides)), 257, ranks, NUMBERS)


def test_the_longest_prompt_of_any_task_counts() -> None:
    found = asked()
    assert found is not None and found.length == 128 and found.whole == 0
    model = load_config(TINY, []).model
    rows = 4 * TOKENS // 128
    assert found.cache == cache_bytes(model, Room(rows, 128, TOKENS // rows)), "as many as are written on at once"
    longer = asked("evals.needle.lengths=[64, 128, 200000]")
    assert longer is not None and longer.length == 200_000
    assert longer.cache == cache_bytes(model, Room(1, 200_000, TOKENS)) and longer.forward == found.forward
    assert asked("evals.tasks=[]") is None
    held_out = asked("evals.tasks=['held_out']")
    assert held_out is not None and held_out.length == 64


def test_ranks_that_cut_the_model_are_given_a_copy_of_it() -> None:
    cut, alone = asked("parallel.shard=2", ranks=2), asked(ranks=2)
    assert cut is not None and alone is not None
    model = build_model(load_config(TINY, []).model, 257)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert cut.whole == weights and alone.whole == 0


@pytest.mark.parametrize("tasks", ["['held_out', 'needle']", "[]"])
def test_the_plan_sums_both_and_compares_the_larger_with_the_device(tasks: str) -> None:
    config = load_config(TINY, [f"evals.tasks={tasks}"])
    told = list(forecasts(config, 257, 1, DEVICE, whole_rows))
    found = asked_of(config, 257, 1, DEVICE.numbers)
    rows = {row["memory of a rank"]: row for row in memory_rows(told, DEVICE, found)}
    then = 0 if found is None else found.beside(told[0].needed)
    assert any("evaluation" in title for title in rows) == (tasks != "[]")
    share = max(told[0].needed.total, then) / 2**20
    assert rows["of 1 MiB"]["stage 0"].rstrip("!") == f"{share:.1%}"
    assert {"weights", "gradients", "moments", "all"} <= rows.keys()
    assert then == 0 or then > told[0].needed.total, "sixteen thousand tokens are read at once, and 256 trained"
