"""Stages whose rows lie on other numbers of ranks than those before: the numbers of whole rows, and resumes."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import train
from attention.attending import Attending
from attention.attention import Attention
from context.local_comm import LocalComm
from context.methods import Split
from model.transformer import build_model
from parallel.mesh import Grid, Mesh, SequenceSettings, build_mesh
from parallel.sequence import ALONE, RowGroup, build_row_groups, split_attention
from parallel.world import World
from run.config import RunConfig, load_config, rows_of_step, show
from run.entry import take_shape
from run.start import Run
from settings import Refusal
from tests.parallel.test_sequence_run import assert_same_numbers, broken_off_after, run_main

TINY = Path(__file__).parents[1] / "tiny.toml"
CPU = torch.device("cpu")
LOSSES = "[{kind = 'loss', coefficient = 1.0}, {kind = 'loss', scope = 'sequence', coefficient = 1.0}, {kind = 'bias'}]"
SETTINGS = (
    "total_tokens=4096",
    "context.stages.0.until_tokens=2048",
    "context.stages.1.until_tokens=4096",
    "checkpoint.every_steps=3",
    "model.num_dense_layers=0",
    "model.attention={num_heads = 4, num_kv_heads = 2, window = 24}",
    "model.pattern=['full', 'window']",
    f"model.moe.balance={LOSSES}",
    "model.moe.z_loss=0.1",
    "evals={every_tokens = 2048, held_out = {lengths = [64], tokens = 512}, tasks = ['held_out']}",
)
"""4 steps of 8 rows, then 4 of 4 longer ones, checkpoints between; every balance loss; questions on both sides."""


def tiny(name: str, *overrides: str) -> RunConfig:
    """Of two micro-batches a step at least for ranks that all hold rows together."""
    tokens = 512 // dist.get_world_size()
    return load_config(TINY, [f"name={name}", f"tokens_per_microbatch={tokens}", *SETTINGS, *overrides])


def ranks_of_rows(first: int, second: int) -> tuple[str, str]:
    return f"context.stages.0.context={first}", f"context.stages.1.context={second}"


def cells(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"runs/{name}/evals.jsonl").read_text().splitlines()]


def assert_same_run(ours: str, theirs: str) -> None:
    assert_same_numbers(ours, theirs)
    asked = [[(cell["step"], cell["task"], cell["length"], cell["count"]) for cell in cells(n)] for n in (ours, theirs)]
    assert asked[0] == asked[1] and {step for step, *_ in asked[0]} == {4, 8}
    scores = [[cell["score"] for cell in cells(name)] for name in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@cache
def whole() -> str:
    """One run of whole rows on each rank, to compare with."""
    run_main(tiny("whole"))
    return "whole"


def case_the_numbers_are_those_of_whole_rows() -> None:
    """Losses, gradients, balance and what is told of routing, on both sides of the change, whichever way it goes."""
    for first, second in {2: ((1, 2), (2, 1)), 4: ((2, 4), (4, 1))}[dist.get_world_size()]:
        name = f"from_{first}_to_{second}"
        run_main(tiny(name, *ranks_of_rows(first, second)))
        assert_same_run(name, whole())


def case_a_run_goes_on_across_the_change() -> None:
    """Broken off at it, right after it, and later, to go on with other numbers than it had."""
    if dist.get_world_size() > 2:
        return
    for steps, later in ((4, (1, 2)), (5, (1, 2)), (7, (2, 1))):
        name = f"broken_after_{steps}"
        broken_off_after(steps, tiny(name, *ranks_of_rows(1, 2)))
        run_main(tiny(name, *ranks_of_rows(*later)))
        assert_same_run(name, whole())


def case_every_step_has_the_group_of_its_stage() -> None:
    """Ranks that hold rows together take the same rows, and those of other groups others."""
    size, seen = dist.get_world_size(), []
    step_of = train.train_step

    def watched(model: Any, optimizer: Any, microbatches: Any, step: Any, run: Run) -> Any:
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        seen.append((step.stage.index, run.row_group.size, run.groups.size, len(microbatches)))
        assert all(isinstance(layer.attend, Split) == (run.row_group.size > 1) for layer in layers)
        local = [layer.attend.local if isinstance(layer.attend, Split) else layer.attend for layer in layers]
        assert all(isinstance(inner, Attending) for inner in local), "a Split of a Split would ask twice"
        return step_of(model, optimizer, microbatches, step, run)

    train.train_step = watched
    try:
        run_main(tiny("watched", *ranks_of_rows(size, 1)))
    finally:
        train.train_step = step_of
    assert seen == [(0, size, 1, size)] * 4 + [(1, 1, size, 1)] * 4


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""


# Without ranks.


def test_a_stage_has_the_number_that_it_says_or_that_of_the_run() -> None:
    config = load_config(TINY, ["parallel.context=2", "context.stages.1.context=4"])
    assert [config.row_ranks(stage) for stage in config.stages] == [2, 4]
    assert config.all_row_ranks == {2: "parallel.context", 4: "context.stages.1.context"}
    run = Run(config, Path("runs/none"), CPU, torch.float32, World(0, 4))
    assert [run.num_groups(stage) for stage in config.stages] == [2, 1]
    config = load_config(TINY, ["parallel.context=3", "context.stages.0.context=2", "context.stages.1.context=2"])
    assert config.all_row_ranks == {2: "context.stages.0.context"}, "what no stage uses is no matter"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["context.stages.1.context=2", "model.moe.capacity={factor = 1.0}"],
            r"context.stages.1.context=2 gives a rank only a part of a row, but model.moe.capacity .*"
            r"set context.stages.1.context=1",
        ),
        (
            ["context.stages.0.context=4", "parallel.sequence.full=ulysses"],
            r'context.stages.0.context=4, parallel.sequence.full="ulysses": .*4 ranks cannot share',
        ),
        (["context.stages.1.context=0"], r"context.stages.1.context=0"),
    ],
)
def test_what_cannot_lie_on_so_many_ranks_is_refused_by_the_key_that_says_so(
    overrides: list[str], expected: str
) -> None:
    with pytest.raises(Refusal, match=expected):
        load_config(TINY, overrides)


def test_ranks_that_do_not_divide_are_refused_by_the_key_that_says_so() -> None:
    config = load_config(TINY, ["context.stages.1.context=2"])
    with pytest.raises(Refusal, match=r"context.stages.1.context=2 does not divide the 3 ranks"):
        build_mesh(config.parallel, config.all_row_ranks, World(0, 3), CPU)
    config = load_config(TINY, ["context.stages.1.context=4", "tokens_per_microbatch=512"])
    assert rows_of_step(config, config.stages.step(4096), 1) == 4
    with pytest.raises(Refusal, match=r"does not divide among 2 groups of context.stages.1.context=4 ranks"):
        rows_of_step(config, config.stages.step(4096), 2)
    with pytest.raises(Refusal, match=r"does not divide among 8 ranks"):
        rows_of_step(config, config.stages.step(0), 8)


def test_no_rank_is_asked_where_no_stage_needs_another() -> None:
    assert build_row_groups(SequenceSettings(), {1: "parallel.context"}, Mesh(Grid(4), World(3, 4), {})) == {1: ALONE}


def test_attention_is_put_back_as_it_was(tmp_path: Path) -> None:
    model = build_model(load_config(TINY, []).model, 31)
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    before = [layer.attend for layer in layers]

    (comm,) = LocalComm.run(1, lambda comm: comm)
    for name in ("ring", "gather"):
        group = RowGroup(comm, SequenceSettings(full=name))
        split_attention(model, group)
        assert [layer.attend.local for layer in layers] == before
        needs = layers[0].training_needs("cpu", torch.float32)
        assert layers[0].attend.backend(needs).name == f"{name}(sdpa)"
    run = Run(load_config(TINY, []), tmp_path, CPU, torch.float32, World(), group)
    take_shape(model, run, run.config.stages[0])
    assert run.row_group is ALONE and [layer.attend for layer in layers] == before


def test_what_it_would_cost_is_shown_of_the_stages_that_share_rows(capsys: pytest.CaptureFixture[str]) -> None:
    show(load_config(TINY, ["context.stages.1.context=2"]))
    shown = capsys.readouterr().out
    assert "# stage 1, full layers by groupcast" in shown and "2 ranks x 64 tokens" in shown
    assert "# stage 0, full" not in shown
