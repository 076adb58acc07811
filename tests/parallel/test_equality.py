"""However the ranks share a model, five steps are those of one process: losses, gradient norms, weights and biases.

Every pair of axes that can be 2, and sets of them on 4 ranks; on 8, by night (`pytest --nightly`).
"""

import itertools
import os
from collections.abc import Callable

import pytest
import torch.distributed as dist

from parallel.world import World
from tests.parallel.setting import Setting, assert_close, this_world

MODEL = (
    "tokens_per_microbatch=128",
    "model.attention.num_kv_heads=2",
    "model.moe.num_shared_experts=1",
    "model.moe.balance=[{kind='bias',step=1e-2},{kind='loss',coefficient=0.05},{kind='loss',scope='sequence',coefficient=0.05}]",
    "model.moe.z_loss=0.01",
    # AdamW's first steps divide by the gradient's own size: of elements that have none, only rounding would be left.
    "optimizer.epsilon=1e-5",
)
AXES = ("replicate", "shard", "expert", "context", "tensor")
STEPS = 5
TOLERANCE = 1e-5


def combinations(size: int) -> list[dict[str, int]]:
    """Sets of axes of length 2 whose ranks are so many at least; what is over is replicated."""
    found = []
    for number in range(1, len(AXES)):
        for axes in itertools.combinations(AXES[1:], number):
            fewest = 2 ** (1 + ("tensor" in axes)) if set(axes) - {"tensor"} else 2
            if fewest <= size and (number <= 2 or size > 2):
                found.append(dict.fromkeys(axes, 2))
    return [{}, *found]


def in_words(axes: dict[str, int]) -> tuple[str, ...]:
    return tuple(f"parallel.{axis}={length}" for axis, length in axes.items())


def case_five_steps_are_those_of_one_process() -> None:
    expected: list[tuple[float, float]] = []
    alone = Setting(World(), *MODEL)
    for number in range(STEPS):
        report = alone.step(number)
        expected.append((float(report.loss), float(report.gradient_norm)))
    values = alone.parts()
    only = os.environ.get("ONLY")
    for axes in combinations(dist.get_world_size()):
        title = " x ".join(axes) or "replicate"
        if only and title != only:
            continue
        own = Setting(this_world(), *MODEL, *in_words(axes))
        for number, (loss, norm) in enumerate(expected):
            report = own.step(number)
            assert_close(f"{title}: loss of step {number}", report.loss, loss, TOLERANCE)
            assert_close(f"{title}: norm of step {number}", report.gradient_norm, norm, TOLERANCE)
        wholes = own.whole(own.parts())
        assert wholes.keys() == values.keys()
        for name, value in values.items():
            assert_close(f"{title}: {name}", wholes[name], value, TOLERANCE)
        if dist.get_rank() == 0:
            print("ok", title, flush=True)


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""
