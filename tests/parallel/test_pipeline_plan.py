"""Which layers lie where, what is refused, how long ranks wait, and gradients that wait: without a second rank."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.transformer import build_model
from moe.experts import Experts
from parallel.later import Later, leave_weights
from parallel.mesh import ParallelSettings, PipeliningSettings
from parallel.pipeline import check_microbatches, stage_of
from parallel.pipeline_part import Part, attach, layers_of
from parallel.pipeline_schedule import SCHEDULES, waiting_share
from run.config import load_config
from settings import Refusal
from tests.parallel.slots import order_of, waiting

TINY = Path(__file__).parents[1] / "tiny.toml"


@pytest.mark.parametrize(("num_layers", "parts"), [(8, 4), (7, 4), (4, 4), (11, 3), (1, 1)])
def test_parts_have_all_layers_once_and_about_as_many(num_layers: int, parts: int) -> None:
    layers = [layers_of(part, parts, num_layers) for part in range(parts)]
    assert [layer for each in layers for layer in each] == list(range(num_layers))
    sizes = [len(each) for each in layers]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_every_name_has_a_rank_and_parts_come_in_turn() -> None:
    config = load_config(TINY, ["model.num_layers=8"])
    model = build_model(config.model, 100)
    stages = {name: stage_of(name, ranks=2, parts=4, num_layers=8) for name in model.state_dict()}
    assert stages["embedding.weight"] == 0 and stages["norm.weight"] == stages["head.weight"] == 1
    of_layers = {int(name.split(".")[1]): stage for name, stage in stages.items() if name.startswith("blocks")}
    assert of_layers == {0: 0, 1: 0, 2: 1, 3: 1, 4: 0, 5: 0, 6: 1, 7: 1}


def test_parts_have_the_names_of_the_model_and_together_all_of_them() -> None:
    model = build_model(load_config(TINY, ["model.num_layers=5"]).model, 100)
    parts = [Part(model, index, 3) for index in range(3)]
    names = [name for part in parts for name in part.state_dict()]
    assert sorted(names) == sorted(model.state_dict()) and [part.moe_layers for part in parts] == [
        slice(0, 1),
        slice(1, 3),
        slice(3, 4),
    ]
    for part in parts:
        for name, parameter in part.named_parameters():
            assert parameter is model.get_parameter(name)


REFUSED = {
    ("parallel.pipeline=4",): r"parallel.pipeline=4 makes 4 parts of model.num_layers=2, .* try parallel.pipeline=2",
    ("parallel.pipeline=2", "parallel.pipelining.schedule=interleaved"): (
        r"parallel.pipeline=2 with parallel.pipelining.parts_per_rank=2 makes 4 parts of model.num_layers=2,"
        r" .* try parallel.pipeline=1 or parallel.pipelining.parts_per_rank=1 or model.num_layers=4"
    ),
    ("parallel.pipeline=2", "model.tied_embeddings=true"): r"model.tied_embeddings=true .* set .*=false or",
    ("parallel.pipeline=2", "parallel.pipelining.parts_per_rank=1", "compile=true"): None,
    (
        "parallel.pipeline=2",
        "parallel.pipelining={schedule='zero_bubble',parts_per_rank=1}",
        "compile=true",
    ): 'compile=true .*schedule="zero_bubble" .* set compile=false, or the schedule to "interleaved"',
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_the_configuration_refuses_by_name(overrides: tuple[str, ...]) -> None:
    expected = REFUSED[overrides]
    if expected is None:
        load_config(TINY, list(overrides))
    else:
        with pytest.raises(Refusal, match=expected):
            load_config(TINY, list(overrides))


def test_a_step_in_one_micro_batch_is_refused_before_ranks_are_known(tmp_path: Path) -> None:
    config = tmp_path / "whole.toml"
    config.write_text(TINY.read_text().replace("tokens_per_microbatch = 256\n", ""))
    with pytest.raises(Refusal, match=r"parallel.pipeline=2 .* tokens_per_microbatch is left out"):
        load_config(config, ["parallel.pipeline=2"])


@pytest.mark.parametrize(
    ("schedule", "ranks", "microbatches", "rows", "expected"),
    [
        ("1f1b", 4, 4, 8, None),
        ("1f1b", 4, 7, 7, None),
        ("1f1b", 4, 2, 8, r"in 2 micro-batches .* needs 4 or more; try tokens_per_microbatch=128, which makes 4"),
        ("1f1b", 4, 2, 2, r"try tokens_per_step of 4 rows of 64 tokens, or more, on each"),
        ("interleaved", 4, 10, 10, None),
        ("interleaved", 4, 9, 9, r"in 2 rounds of the same size; try tokens_per_step of"),
        ("zero_bubble", 4, 9, 36, r"in 2 rounds of the same size; try tokens_per_microbatch=384, which makes 6"),
    ],
)
def test_micro_batches_that_a_schedule_cannot_take(
    schedule: Any, ranks: int, microbatches: int, rows: int, expected: str | None
) -> None:
    settings = ParallelSettings(pipeline=ranks, pipelining=PipeliningSettings(schedule=schedule))
    if expected is None:
        check_microbatches(settings, microbatches, rows, 64, "tokens_per_step")
        order_of(schedule, ranks, 2, microbatches)
        return
    with pytest.raises(Refusal, match=expected):
        check_microbatches(settings, microbatches, rows, 64, "tokens_per_step")
    with pytest.raises(ValueError, match="microbatches"):  # as torch would, later and without a way out
        order_of(schedule, ranks, 2, microbatches)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("ranks", "parts_per_rank", "microbatches"), [(2, 2, 8), (4, 2, 8), (4, 3, 16), (4, 1, 4), (8, 2, 32)]
)
def test_ranks_wait_as_long_as_the_arithmetic_says(
    schedule: str, ranks: int, parts_per_rank: int, microbatches: int
) -> None:
    parts = ranks * (1 if schedule == "1f1b" else parts_per_rank)
    shares = waiting(order_of(schedule, ranks, parts_per_rank, microbatches), parts)
    assert set(shares) == {waiting_share(schedule, ranks, parts_per_rank, microbatches)}


def test_what_is_attached_has_a_gradient_of_one_and_x_its_own() -> None:
    x, scalar = torch.randn(2, 3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    (attach(x, 3 * scalar) * 5).sum().backward()
    assert scalar.grad is not None and scalar.grad.item() == 3
    assert x.grad is not None and x.grad.eq(5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_wait_are_those_made_at_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False), nn.Linear(16, 16)]
    at_once, waiting_ones = nn.Sequential(*layers), copy.deepcopy(nn.Sequential(*layers))
    later = Later()
    leave_weights(waiting_ones, later)
    x = torch.randn(3, 5, 16)
    found = []
    for module in (at_once, waiting_ones):
        inner = x.clone().requires_grad_()
        for _ in range(2):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                out = module(inner)
            out.float().square().sum().backward()
        found.append((out, inner.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [p.grad is None for p in waiting_ones.parameters()] == [True, True, False, False]
    later.take()()
    for ours, theirs in zip(waiting_ones.parameters(), at_once.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    before = [p.grad.clone() for p in waiting_ones.parameters() if p.grad is not None]
    later.take()()
    assert all(map(torch.equal, before, [p.grad for p in waiting_ones.parameters() if p.grad is not None]))


@pytest.mark.parametrize("matmul", ["grouped_mm", "bmm", "blocked"])
@pytest.mark.parametrize("recompute", ["none", "up"])
def test_experts_leave_what_they_can(matmul: Any, recompute: Any) -> None:
    torch.manual_seed(0)
    at_once = Experts(4, 16, 16, matmul, recompute)
    waits = copy.deepcopy(at_once)
    later = Later()
    leave_weights(waits, later)
    x, chosen = torch.randn(9, 16), torch.randint(0, 5, (9, 2))
    gates = torch.rand(9, 2)
    gradients: list[Tensor | None] = []
    for experts in (at_once, waits):
        inner = x.clone().requires_grad_()
        experts(inner, chosen, gates).square().sum().backward()
        gradients.append(inner.grad)
    torch.testing.assert_close(*gradients)
    assert (waits.down.grad is None) == (matmul != "blocked")
    later.take()()
    for ours, theirs in zip(waits.parameters(), at_once.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
