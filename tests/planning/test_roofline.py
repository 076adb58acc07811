"""Floors of time: below every prediction, and what they are made of, by hand."""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch

from benchmarks.published import Comparison, comparisons, device_of
from model.size import attention_layer, multiplied_weights
from parallel.mesh import Grid
from planning.device import Ceilings, Device, published
from planning.forecast import forecasts, whole_rows
from planning.outlook import table
from planning.roofline import floor_of, roofline_rows, step_floor
from planning.speeds import Repeats
from planning.step_parts import Work
from planning.step_time import step_time
from run.config import load_config
from tests.planning.test_step_time import SLOW, T, V, job_of, model_of, part
from tests.planning.test_step_time import device_of as any_device

TINY = Path(__file__).parents[1] / "tiny.toml"
EVERY = list(comparisons())


@pytest.mark.parametrize("each", EVERY, ids=[each.row["name"] for each in EVERY])
def test_no_published_run_is_predicted_below_its_floor(each: Comparison) -> None:
    device, step = device_of(each.row), each.predicted
    for one in step.parts:
        assert floor_of(one.work, device).seconds <= one.seconds * (1 + 1e-9), one
    floor = step_floor(step, device)
    assert 0.2 < floor.seconds / step.seconds < 1
    published_seconds = each.predicted.tokens_of_rank / each.row["tokens_per_second"]
    assert floor.seconds < published_seconds, "nobody was faster than can be"


def test_what_limits_published_runs_is_what_their_authors_fought() -> None:
    limits = {each.row["name"]: step_floor(each.predicted, device_of(each.row)).limit for each in EVERY}
    assert limits["DeepSeek-V3, 256 H100, pipeline 4, expert 64"] == "network"
    assert limits["MPT 7b 2k, 8 H100"] == limits["MPT 70b 2k, 64 A100"] == "compute"


@pytest.mark.parametrize("name", ["dense", "latent", "experts", "windows"])
def test_operations_of_a_step_are_the_models_and_what_flash_attention_does_again(name: str) -> None:
    """Of 3.5 forwards of scores, 3 are the model's."""
    job = job_of(name)
    step = step_time(job, any_device())
    work = reduce(add, (one.work for one in step.parts))
    weights, scores = 4 * T * 6 * multiplied_weights(job.model, V), part(step, "attention scores").work.flops
    assert work.flops - scores == pytest.approx(weights)
    assert scores * 3 / 3.5 == pytest.approx(step.flops_of_rank - weights)


def test_a_product_reads_two_matrices_and_writes_one_in_each_of_its_three() -> None:
    step = step_time(job_of("dense", microbatches=1), any_device())
    moved, (tokens, vocab, width) = part(step, "head").work.moved, (2 * T, V, 32)
    assert moved == 3 * 2 * (tokens * width + width * vocab + tokens * vocab)
    again = step_time(job_of("dense", microbatches=1, repeats=Repeats(products=1.0)), any_device())
    once = sum(part(again, kind).work.flops for kind in ("attention", "feed forward"))
    assert part(again, "recomputed").work.flops == pytest.approx(once / 3)
    channels = attention_layer(model_of("dense")).channels
    assert part(again, "attention scores").work.moved == pytest.approx(3.5 * 4 * tokens * channels * 2)


@pytest.mark.parametrize(
    ("grid", "name", "ranks_per_node", "link"),
    [
        (Grid(4, shard=4), "shard", 4, "in"),
        (Grid(4, shard=4), "shard", 1, "out"),
        (Grid(4, tensor=2), "tensor", 4, "in"),
        (Grid(4), "replicate", 4, "in"),
        (Grid(4), "replicate", 2, "out"),
        (Grid(2, pipeline=2), "pipeline", 4, "in"),
        (Grid(2, pipeline=2), "pipeline", 1, "out"),
        (Grid(4, expert=4), "expert", 4, "in"),
    ],
)
def test_what_is_sent_takes_its_bytes_over_its_link(grid: Grid, name: str, ranks_per_node: int, link: str) -> None:
    links = replace(SLOW, ranks_per_node=ranks_per_node)
    device = replace(any_device(links), link_names=("in", "out"))
    sent = part(step_time(job_of("experts", grid=grid), device), name)
    floor = floor_of(sent.work, device)
    beside = 2 if name == "replicate" and ranks_per_node == 2 else 1
    bandwidth = links.inside.bandwidth if link == "in" else beside * links.across.bandwidth
    assert floor.limit == link and floor.seconds == pytest.approx(sent.sent / bandwidth)
    assert floor.seconds < sent.seconds, "which has a start and hops, too"


def test_tokens_that_go_to_both_kinds_of_places_take_the_longer() -> None:
    links = replace(SLOW, ranks_per_node=2)
    sent = part(step_time(job_of("experts", grid=Grid(4, expert=4)), any_device(links)), "expert")
    assert 0 < sent.work.inside < sent.work.across
    share = sent.work.inside * links.inside.bandwidth / sent.sent
    assert share == pytest.approx(1 / 3), "of three others, one is beside it"


def test_the_greatest_of_what_has_to_be_done_limits() -> None:
    device = Device("cuda", "x", torch.bfloat16, 1e12, None, 1e11, ceilings=Ceilings(1e11, 1e10, "here"))
    for work, limit in ((Work(flops=2e11, moved=1e10), "compute"), (Work(1e11, 2e10, 1.9), "memory")):
        floor = floor_of(work, device)
        assert (floor.limit, floor.seconds) == (limit, 2.0)
    assert floor_of(Work(1e11, 1e10, 0.5, 3.0), device).limit == "links across nodes"
    assert floor_of(Work(), device).limit == ""
    bare = replace(device, ceilings=None)
    assert floor_of(Work(flops=2e12), bare).seconds == 2 and floor_of(Work(moved=2e11), bare).seconds == 2


@pytest.mark.parametrize("change", [lambda w: w.times(2), lambda w: w + w])
def test_work_adds_up(change: Callable[[Work], Work]) -> None:
    assert change(Work(1.0, 2.0, 3.0, 4.0)) == Work(2.0, 4.0, 6.0, 8.0)


def test_micro_batches_and_layers_add_up() -> None:
    one, two = (step_time(job_of(microbatches=number), any_device()) for number in (1, 2))
    assert part(two, "attention").work == part(one, "attention").work.times(2)
    assert part(one, "update").work == part(two, "update").work, "once a step"
    deep = replace(job_of(microbatches=1), model=model_of("dense", num_layers=8))
    assert part(step_time(deep, any_device()), "attention").work == part(one, "attention").work.times(2)


def test_the_table_says_floor_share_and_limit() -> None:
    device = published("h200")
    told = list(forecasts(load_config(TINY, []), 257, 1, device, whole_rows))
    lines = list(table(list(roofline_rows(told, device))))
    assert lines[0].split("  ")[0] == "floor, what limits"
    floor = step_floor(told[0].step, device)
    assert lines[-1].split()[0] == "step" and f"{floor.seconds / told[0].step.seconds:.0%}, {floor.limit}" in lines[-1]
    assert not any("NVLink" in line for line in lines), "one rank sends nothing"
