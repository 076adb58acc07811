"""However the ranks share a model, its steps are those of one process: losses, gradient norms, weights and biases.

Every set of axes that 2 and 4 ranks allow, and other models over some of them; more of them, and 8 ranks, by night
(`pytest --nightly`). What is proven, and how closely, tests/parallel/proven.py makes a table of.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.world import World
from tests.parallel.proven import Worst
from tests.parallel.setting import Setting, this_world

LOSSES = "[{kind='bias',step=1e-2},{kind='loss',coefficient=0.05},{kind='loss',scope='sequence',coefficient=0.05}]"
MODEL = (
    "tokens_per_microbatch=128",
    "model.attention.num_kv_heads=2",
    "model.moe.num_shared_experts=1",
    f"model.moe.balance={LOSSES}",
    "model.moe.z_loss=0.01",
    # AdamW's first steps divide by the gradient's own size: of elements that have none, only rounding would be left.
    "optimizer.epsilon=1e-5",
)
Axes = dict[str, int]


class Expected:
    """What one process makes of so many steps."""

    def __init__(self, overrides: tuple[str, ...], steps: int) -> None:
        self.overrides, alone = overrides, Setting(World(), *overrides)
        self.reports = [alone.step(number) for number in range(steps)]
        self.values = alone.parts()

    def check(self, title: str, axes: Axes, *more: str) -> None:
        words = tuple(f"parallel.{axis}={length}" for axis, length in axes.items())
        own, worst = Setting(this_world(), *self.overrides, *words, *more), Worst()
        for number, report in enumerate(self.reports):
            ours = own.step(number)
            worst.see("loss", f"step {number}", ours.loss, report.loss)
            worst.see("norm", f"step {number}", ours.gradient_norm, report.gradient_norm)
        wholes = own.whole(own.parts())
        assert wholes.keys() == self.values.keys()
        for name, value in self.values.items():
            worst.see("weights", name, wholes[name], value)
        worst.judge(title, axes, len(self.reports))


def sets_of(size: int) -> Iterable[Axes]:
    """Every set of axes of length 2 that needs so many ranks, or of which shards would have replicas on them."""
    axes = ("shard", "expert", "context", "tensor")
    for number in range(len(axes) + 1):
        for names in itertools.combinations(axes, number):
            fewest = 2 ** (("tensor" in names) + bool(set(names) - {"tensor"}))
            has_replicas = fewest < size and (size == 2 or "shard" in names)
            is_chosen = is_night() or size == 2 or "tensor" in names or number in (1, 3)
            if (fewest == size or has_replicas) and is_chosen:
                yield dict.fromkeys(names, 2)


def is_night() -> bool:
    """Whether there is time for all of it."""
    return "LONGMOE_NIGHT" in os.environ or dist.get_world_size() > 4


def few(ways: Sequence[Any]) -> Sequence[Any]:
    """The first of them where ranks are many and time is short."""
    return ways if is_night() or dist.get_world_size() < 4 else ways[:1]


def case_every_set_of_axes() -> None:
    if dist.get_world_size() == 3:
        return
    expected = Expected((*MODEL, "tokens_per_step=1024") if dist.get_world_size() == 8 else MODEL, steps=5)
    for axes in sets_of(dist.get_world_size()):
        expected.check("experts, shared ones, every balance loss", axes)


WINDOWS = ("model.attention={num_heads=4,num_kv_heads=2,window=24}", "model.pattern=['full','window']")
LATENT = (
    "model.attention={kind='latent',num_heads=4,query_rank=8,latent_rank=8,nope_channels=4,rope_channels=4,"
    "value_channels=4}"
)
CHOICE = "{kind='expert_choice',at_eval='token_choice'}"
ONLY_LOSSES = "model.moe.balance={kind='loss',coefficient=0.05}"
OTHERS: dict[str, tuple[tuple[str, ...], dict[int, tuple[Axes, ...]]]] = {
    "latent attention": (
        (*MODEL[:1], *MODEL[2:], LATENT),
        {
            2: ({"tensor": 2}, {"context": 2, "shard": 2}),
            4: ({"tensor": 2, "context": 2}, {"tensor": 2, "shard": 2, "expert": 2}, {"tensor": 4}),
        },
    ),
    "dense, tied embeddings": (
        (*MODEL, "model.num_dense_layers=2", "model.tied_embeddings=true", "evals.tasks=['held_out']"),
        {2: ({"tensor": 2}, {"shard": 2}), 4: ({"tensor": 2, "shard": 2, "context": 2}, {"shard": 4})},
    ),
    "everything run again": (
        (*MODEL, "recompute='full'"),
        {2: ({"shard": 2, "expert": 2, "context": 2},), 4: ({"shard": 2, "expert": 2, "context": 2, "tensor": 2},)},
    ),
    "operations run again": (
        (*MODEL, "recompute='ops'"),
        {2: ({"tensor": 2},), 4: ({"shard": 2, "expert": 4, "context": 2}, {"expert": 2, "context": 2, "tensor": 2})},
    ),
    "null experts, a capacity": (
        (
            *MODEL,
            "model.moe.num_experts=8",
            "model.moe.capacity={factor=0.75}",
            "model.moe.null_experts={count=2,output='copy'}",
        ),
        {2: ({"tensor": 2}, {"shard": 2, "expert": 2}), 4: ({"tensor": 2, "shard": 2, "expert": 2},)},
    ),
    "experts choose": (
        (*MODEL, f"model.moe.router={CHOICE}", ONLY_LOSSES),
        {2: ({"tensor": 2}, {"shard": 2, "expert": 2}), 4: ({"tensor": 2, "shard": 2, "expert": 2},)},
    ),
    "shards of uneven size": (
        (*MODEL, "tokens_per_step=768", "tokens_per_microbatch=256", "model.moe.num_experts=3"),
        {3: ({"shard": 3}, {"shard": 3, "expert": 3}, {"context": 3, "shard": 3})},
    ),
    "8 heads over 4": (
        (*MODEL, "model.attention={num_heads=8,num_kv_heads=4,channels=4,sink=true,head_norms=true}"),
        {4: ({"tensor": 4}, {"shard": 4, "expert": 2}, {"shard": 2, "expert": 4}, {"context": 4, "shard": 4})},
    ),
}


def case_other_models() -> None:
    size = dist.get_world_size()
    for title, (overrides, by_size) in OTHERS.items():
        if size in by_size:
            expected = Expected(overrides, steps=3)
            for axes in few(by_size[size]):
                expected.check(title, axes)


def case_windows_by_every_method_and_layout() -> None:
    size = dist.get_world_size()
    if size == 3:
        return
    expected = Expected((*MODEL[:1], *MODEL[2:], *WINDOWS), steps=3)
    axes = {"context": 2, "shard": 2} if size == 2 else {"context": 2, "tensor": 2}
    layouts = itertools.cycle(("balanced", "zigzag", "contiguous"))
    for full, window in few((("usp", "gather"), ("ulysses", "ring"), ("ring", "groupcast"))):
        ways = f"full='{full}',window='{window}',layout='{next(layouts)}'"
        expected.check("windows, by other methods and layouts", axes, f"parallel.sequence={{{ways}}}")


def case_compiled_layers() -> None:
    if is_night() and dist.get_world_size() == 4:
        Expected((*MODEL, "compile=true"), steps=2).check("compiled", {"shard": 2, "tensor": 2})


def case_eight_ranks() -> None:
    """Axes of several lengths at once, replicas and a pipeline among them."""
    if dist.get_world_size() < 8:
        return
    heads = "model.attention={num_heads=8,num_kv_heads=4,channels=4,sink=true,head_norms=true}"
    expected = Expected((*MODEL, "tokens_per_step=1024", heads), steps=5)
    for axes in (
        {"replicate": 2, "shard": 2, "expert": 4, "context": 2, "tensor": 2},
        {"replicate": 2, "shard": 4, "expert": 2, "context": 4},
        {"replicate": 1, "shard": 8, "expert": 4, "context": 2},
        {"shard": 2, "expert": 2, "tensor": 4},
        {"shard": 2, "expert": 2, "context": 2, "tensor": 2, "pipeline": 2},
    ):
        expected.check("8 heads over 4", axes)


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 3, 4)


@pytest.fixture(scope="module")
def by_night(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> Iterator[dict[int, dict[str, str]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGMOE_NIGHT", "1")
        yield run_on_ranks(__file__, 4) | run_on_ranks(__file__, 8)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""


@pytest.mark.nightly
@pytest.mark.distributed
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks_by_night(by_night: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert by_night[size].get(case, "it never ran") == ""


def test_a_difference_is_seen_wherever_it_is() -> None:
    worst = Worst()
    worst.see("loss", "step 0", torch.tensor(1.0), torch.tensor(1.0))
    worst.see("loss", "step 1", torch.tensor(1.1), torch.tensor(1.0))
    worst.see("loss", "step 2", torch.tensor(1.0), torch.tensor(1.0))
    assert worst.loss == pytest.approx(0.1) and worst.where == {"loss": "step 1"}
    worst.see("norm", "step 0", torch.tensor(torch.nan), torch.tensor(1.0))
    assert not worst.norm <= 1e9
