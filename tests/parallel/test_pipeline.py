"""Ranks that hold the layers one after another give the steps of one process: losses, norms, weights, what is told.

The cases run on 2 and 4 gloo ranks (tests/ranks.py); each rank also computes the whole of it by itself.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import AXES
from parallel.pipeline_part import Elsewhere
from parallel.pipeline_schedule import Pipeline, Stage
from parallel.world import World
from run.pipeline_pass import rehearse, try_parts
from run.record import StepReport
from tests.parallel.proven import TOLERANCE, Worst
from tests.parallel.setting import Setting, assert_close, this_world
from tests.parallel.slots import one_by_one

BASE = (
    "model.num_layers=4",
    "tokens_per_microbatch=128",
    "model.attention.num_kv_heads=2",
    "model.moe.num_shared_experts=1",
    # AdamW's first steps divide by the gradient's own size: of elements that have none, only rounding would be left.
    "optimizer.epsilon=1e-5",
)
LOSSES = (
    "{kind='loss',coefficient=0.5},{kind='loss',scope='sequence',coefficient=0.5},"
    "{kind='loss',scope='microbatch',tokens=256,coefficient=0.5}"
)
EVERYTHING = (
    *BASE,
    f"model.moe.balance=[{{kind='bias',rule='proportional',step=1e-2}},{LOSSES}]",
    "model.moe.z_loss=0.1",
    "recompute=true",
)
OTHER_MODELS = {
    "the first rank has no MoE layer": (*BASE, "model.num_dense_layers=3", f"model.moe.balance=[{LOSSES}]"),
    "dense": (*BASE, "model.num_dense_layers=4"),
    "null experts and a capacity": (*BASE, "model.moe.capacity={factor=0.75}", "model.moe.null_experts={count=2}"),
}
INTERLEAVED = "parallel.pipelining.schedule=interleaved"
ZERO_BUBBLE = "parallel.pipelining.schedule=zero_bubble"
GROUPED = "model.moe.experts=grouped_mm"  # leaves its weight gradients for later

MIXTURE = "experts, shared ones, every balance loss"

Steps = list[tuple[float, float, dict[str, float]]]


@cache
def alone(steps: int, *overrides: str) -> tuple[Steps, dict[str, Tensor]]:
    """What one process makes of it: of each step loss, norm and what is told, and at the end all values."""
    setting = Setting(World(), *overrides)
    return [numbers(setting.step(number)) for number in range(steps)], setting.parts()


def numbers(report: StepReport) -> tuple[float, float, dict[str, float]]:
    return float(report.loss), float(report.gradient_norm), report.routing.report()


def parts_per_rank(count: int) -> str:
    return f"parallel.pipelining.parts_per_rank={count}"


def assert_same(title: str, model: tuple[str, ...], others: tuple[str, ...], steps: int) -> Setting:
    """others: how the ranks share the model, and nothing that could change it."""
    expected, values = alone(steps, *model)
    own = Setting(this_world(), *model, *others)
    worst = Worst()
    for number, (loss, norm, told) in enumerate(expected):
        our_loss, our_norm, ours = numbers(own.step(number))
        worst.see("loss", f"step {number}", torch.tensor(our_loss), torch.tensor(loss))
        worst.see("norm", f"step {number}", torch.tensor(our_norm), torch.tensor(norm))
        assert ours.keys() == told.keys(), title
        for key, number_told in told.items():
            if key != "choice_overlap" or own.run.mesh.grid.data == 1:  # else it tells of a rank's own rows
                assert_close(f"{title}: {key} of step {number}", ours[key], number_told, TOLERANCE)
    wholes = own.whole(own.parts())
    assert wholes.keys() == values.keys()
    for name, value in values.items():
        worst.see("weights", name, wholes[name], value)
    axes = {axis: getattr(own.config.parallel, axis) or 1 for axis in ("pipeline", "replicate", *AXES)}
    worst.judge(f"{title}; {own.config.parallel.pipelining.schedule}", axes, steps)
    return own


def case_five_steps_are_those_of_one_process() -> None:
    """By every schedule."""
    ranks = dist.get_world_size()
    if ranks == 8:
        return
    pipeline = f"parallel.pipeline={ranks}"
    own = assert_same(MIXTURE, EVERYTHING, (pipeline,), steps=5)
    layers = [layer for layer, block in enumerate(own.model.blocks) if not isinstance(block, Elsewhere)]
    assert len(layers) == 4 // ranks and len({name.split(".")[1] for name in own.parts() if "blocks" in name}) == len(
        layers
    )
    for schedule in (INTERLEAVED, ZERO_BUBBLE):
        assert_same(MIXTURE, EVERYTHING, (pipeline, schedule, parts_per_rank(4 // ranks), GROUPED), steps=5)


def case_ranks_go_through_1f1b_as_its_waiting_is_counted() -> None:
    """The order that tests/parallel/slots.py counts slots of, as it is not torch's own table."""
    ranks = dist.get_world_size()
    if ranks == 8:
        return
    done: list[tuple[int, str, int]] = []

    def told(kind: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def tell(stage: Stage, number: int, *args: Any, **kwargs: Any) -> Any:
            done.append((stage.stage_index, kind, number))
            return inner(stage, number, *args, **kwargs)

        return tell

    own = Setting(this_world(), *BASE, f"parallel.pipeline={ranks}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "forward_one_chunk", told("F", Stage.forward_one_chunk))
        patch.setattr(Stage, "backward_one_chunk", told("B", Stage.backward_one_chunk))
        rehearse(own.model, own.microbatches(0), own.run, None)
    assert done == one_by_one(dist.get_rank(), ranks, 4)


def case_parts_in_turn() -> None:
    """Two parts on each of four ranks, and weight gradients that cannot wait."""
    if dist.get_world_size() == 4:
        model = (*EVERYTHING, "model.num_layers=8")
        for schedule in (INTERLEAVED, ZERO_BUBBLE):
            assert_same(f"{MIXTURE}, 8 layers", model, ("parallel.pipeline=4", schedule, parts_per_rank(2)), steps=2)


def case_other_models() -> None:
    for title, model in OTHER_MODELS.items():
        if dist.get_world_size() == 2:
            assert_same(title, model, ("parallel.pipeline=2", ZERO_BUBBLE, parts_per_rank(1)), steps=2)


def case_with_another_axis() -> None:
    """Every axis beside the pipeline, by one schedule or another."""
    schedules = {
        "replicate": (INTERLEAVED, parts_per_rank(2)),
        "shard": (ZERO_BUBBLE, parts_per_rank(2), GROUPED),
        "expert": (ZERO_BUBBLE, parts_per_rank(1), GROUPED),
        "context": (INTERLEAVED, parts_per_rank(2)),
        "tensor": (ZERO_BUBBLE, parts_per_rank(2), GROUPED),
    }
    if dist.get_world_size() == 4:
        for axis, schedule in schedules.items():
            axes = ("parallel.pipeline=2", f"parallel.{axis}=2")
            assert_same(MIXTURE, EVERYTHING, axes, steps=5)
            assert_same(MIXTURE, EVERYTHING, (*axes, *schedule), steps=2)


def case_gradients_that_wait_in_low_precision() -> None:
    """Beside shards, whose gradients FSDP sums in fp32 whenever they are made."""
    if dist.get_world_size() == 4:
        alone = Setting(World(), *EVERYTHING, dtype=torch.bfloat16)
        axes = ("parallel.pipeline=2", "parallel.shard=2", ZERO_BUBBLE, parts_per_rank(2), GROUPED)
        own = Setting(this_world(), *EVERYTHING, *axes, dtype=torch.bfloat16)
        for number in range(2):
            (loss, norm, _), (our_loss, our_norm, _) = numbers(alone.step(number)), numbers(own.step(number))
            assert_close("loss", our_loss, loss, 1e-4)
            assert_close("norm", our_norm, norm, 1e-3)


def case_three_axes() -> None:
    if dist.get_world_size() == 8:
        axes = ("parallel.pipeline=2", "parallel.shard=2", "parallel.expert=2", "parallel.tensor=2")
        assert_same(MIXTURE, EVERYTHING, axes, steps=5)
        axes = ("parallel.pipeline=2", "parallel.shard=4", "parallel.expert=2", "parallel.context=2")
        assert_same(MIXTURE, EVERYTHING, (*axes, ZERO_BUBBLE, parts_per_rank(2), GROUPED), steps=5)


def case_a_stage_of_another_length() -> None:
    """Shapes change, and come back; what is rehearsed leaves nothing but gradients."""
    if dist.get_world_size() == 2:
        whole, own = Setting(World(), *EVERYTHING), Setting(this_world(), *EVERYTHING, "parallel.pipeline=2")
        before = {name: value.clone() for name, value in own.parts().items()}
        rehearse(own.model, own.microbatches(0)[:2], own.run, None)
        try_parts(own.model, own.run.config.stages[0], own.run)
        assert all(value.equal(own.parts()[name]) for name, value in before.items())
        for stage in (0, 1, 0):
            for setting in (whole, own):
                setting.plan = setting.config.stages[stage].step  # type: ignore[method-assign]
                setting.model.use_rotary(setting.config.stages[stage].rotary)
            theirs, ours = numbers(whole.step(0)), numbers(own.step(0))
            assert_close(f"loss in stage {stage}", ours[0], theirs[0], TOLERANCE)
            assert_close(f"norm in stage {stage}", ours[1], theirs[1], TOLERANCE)
        pipeline = own.model.pipeline
        assert isinstance(pipeline, Pipeline) and len(pipeline._built) == 2, "one of each kind is kept"


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""


@pytest.mark.nightly
@pytest.mark.distributed
def test_on_eight_ranks(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> None:
    outcomes = run_on_ranks(__file__, 8)[8]
    assert outcomes.keys() == set(CASES) and "".join(outcomes.values()) == ""
