"""Muon of matrices that ranks have cut is Muon of the whole ones."""

import itertools
from collections.abc import Callable

import pytest
import torch.distributed as dist

from parallel.world import World
from tests.parallel.setting import Setting, assert_close, this_world

MUON = ("tokens_per_microbatch=128", "model.attention.num_kv_heads=2", "optimizer.kind=muon")
STEPS = 3


def case_steps_are_those_of_one_process() -> None:
    """Muon works in bf16 inside: a rounding there moves a weight by a thousandth of the step."""
    alone = Setting(World(), *MUON)
    losses = [float(alone.step(number).loss) for number in range(STEPS)]
    first = {name: alone.first_value(name, value.shape, 0) for name, value in alone.parts().items()}
    for axes in itertools.chain(*(itertools.combinations(("shard", "tensor", "expert"), n) for n in (1, 2, 3))):
        if 2 ** (1 + ("tensor" in axes and len(axes) > 1)) > dist.get_world_size():
            continue
        own = Setting(this_world(), *MUON, *(f"parallel.{axis}=2" for axis in axes))
        assert type(own.optimizer.optimizers[0]).__name__ == "MuonOverRanks" or axes == ("expert",)
        for number, loss in enumerate(losses):
            assert_close(f"{axes}: loss of step {number}", own.step(number).loss, loss, 1e-4)
        wholes = own.whole(own.parts())
        for name, value in alone.parts().items():
            assert_close(f"{axes}: change of {name}", wholes[name] - first[name], value - first[name], 2e-2)


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""
