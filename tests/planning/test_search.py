"""The search for a mesh against all of them, tried one by one."""

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import plan
from context.lengths import divisors
from parallel.mesh import grid_of
from planning.device import published
from planning.jobs import framework_of, job_of
from planning.search import WAYS, Search
from planning.search_words import numbers_of
from planning.step_time import step_time
from run.config import RunConfig, load_config
from run.needs import needs_of
from settings import Refusal, to_dict, validate

TINY = Path(__file__).parents[1] / "tiny.toml"
VOCAB_SIZE, DEVICE = 257, published("h100")
SMALL = ("tokens_per_step=1024", "total_tokens=6144", "model.attention.num_kv_heads=2", "model.num_layers=3")
OWN = (*SMALL, "context.stages.0.context=2")


@cache
def everything(overrides: tuple[str, ...], ranks: int) -> tuple[tuple[float, int, tuple[Any, ...]], ...]:
    """(seconds of the run, bytes of a rank, what it is) of every way that a whole configuration may be shared out."""
    return tuple(_everything(load_config(TINY, list(overrides)), ranks))


def _everything(config: RunConfig, ranks: int) -> Iterator[tuple[float, int, tuple[Any, ...]]]:
    table, names = to_dict(config), ("tensor", "pipeline", "shard", "expert", "context")
    for axes in itertools.product(divisors(ranks), repeat=5):
        parallel = dict(zip(names, axes, strict=True))
        for size in (128 * number for number in divisors(1024 // 128)):
            changed = {"parallel": parallel, "tokens_per_microbatch": size}
            try:
                given = validate(table | changed, RunConfig, "brute force")
                yield from _one(given, ranks, axes)
            except ValueError:
                continue


def _one(config: RunConfig, ranks: int, axes: tuple[int, ...]) -> Iterator[tuple[float, int, tuple[Any, ...]]]:
    """All that may be computed again; raises ValueError where ranks or steps do not divide."""
    grid = grid_of(config.parallel, ranks)
    steps = [stage.longest_step() for stage in config.stages]
    if any(grid.data % size for size in config.all_row_ranks):
        return
    for way in WAYS:
        given, kinds = config.model_copy(update={"recompute": way}), (way,) * config.model.num_layers
        jobs = [job_of(given, VOCAB_SIZE, step, grid, (step.sequence_length,), kinds) for step in steps]
        if any(job.microbatches < grid.pipeline for job in jobs):
            return  # which a run refuses when its data is there
        needed = max(needs_of(given, VOCAB_SIZE, step, ranks, DEVICE.numbers).total for step in steps)
        times = (step_time(job, DEVICE, framework_of(given, DEVICE)).seconds for job in jobs)
        seconds = sum(stage.num_steps * each for stage, each in zip(given.stages, times, strict=True))
        yield seconds, needed, (axes, config.tokens_per_microbatch, way)


def searched(overrides: tuple[str, ...], ranks: int, room: float) -> Search:
    return Search(load_config(TINY, list(overrides)), VOCAB_SIZE, ranks, DEVICE, room)


@pytest.mark.parametrize(("overrides", "ranks"), [(SMALL, 4), (SMALL, 2), (OWN, 2)])
@pytest.mark.parametrize("share", [1.0, 0.15, 0.0])
def test_the_fastest_that_fits_is_found(overrides: tuple[str, ...], ranks: int, share: float) -> None:
    """share: of all ways, so many fit in the room that there is."""
    every = everything(overrides, ranks)
    assert len(every) > 20
    needs = sorted(needed for _, needed, _ in every)
    room = needs[int(share * (len(needs) - 1))] if share else needs[0] - 1
    fitting = [each for each in every if each[1] <= room]
    search = searched(overrides, ranks, room)
    found = search.best(3)
    assert bool(found) == bool(fitting) == (share > 0)
    if found:
        assert found[0].seconds == pytest.approx(min(fitting)[0], rel=1e-12)
        assert all(one.seconds <= two.seconds for one, two in itertools.pairwise(found))
    for each in found:
        axes = tuple(getattr(each.candidate.parallel, name) for name in plan_axes())
        own = [(s, n) for s, n, what in every if what == (axes, *told(each))]
        assert [(pytest.approx(s), n) for s, n in own] == [(each.seconds, each.bytes)] and each.bytes <= room
    assert share == 1.0 or search.too_large + search.too_small > 0


def plan_axes() -> tuple[str, ...]:
    return ("tensor", "pipeline", "shard", "expert", "context")


def told(found: Any) -> tuple[int, str]:
    return found.candidate.tokens_per_microbatch, found.candidate.recompute


def test_the_next_best_differ_in_more_than_ranks_to_a_row() -> None:
    found = searched(SMALL, 4, 1e15).best(4)
    meshes = {each.candidate.parallel.model_copy(update={"context": 1}).model_dump_json() for each in found}
    assert len(found) == len(meshes) == 4


def test_the_search_is_the_same_each_time_and_counts_what_it_met() -> None:
    tied = (*SMALL, "model.tied_embeddings=true")  # which no pipeline can do with
    one, two = searched(tied, 4, 1e15), searched(tied, 4, 1e15)
    assert [each.candidate for each in one.best(3)] == [each.candidate for each in two.best(3)]
    assert (one.meshes, one.refused, one.timed) == (two.meshes, two.refused, two.timed)
    assert one.meshes > one.refused > 0 and one.too_large == one.too_small == 0
    assert searched(SMALL, 4, 10.0).best(1) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_bound_of_memory_is_above_what_is_needed(ranks: int) -> None:
    search = searched(SMALL, ranks, 0.0)
    for parallel in search.parallels():
        for candidate in search.fastest(parallel):
            search.room = 0.0
            bound = search.needed(candidate)
            search.room = 1e15
            assert 0 < bound <= search.needed(candidate)


def test_ranges() -> None:
    assert numbers_of("64") == [64] and numbers_of("1-8") == [1, 2, 4, 8] and numbers_of("3-20") == [3, 6, 12, 20]
    for text in ("0", "-1", "8-4", "1-", "a", "4,8", ""):
        with pytest.raises(Refusal, match="--search"):
            numbers_of(text)


def test_what_is_printed_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--search", "1-4", "--device", "h100", *SMALL, "parallel.replicate=7", "recompute=ops"]
    plan.main(plan.parse_arguments([str(TINY), *given]))
    said = capsys.readouterr().out
    assert said.startswith("1 x h100, fastest first: 1 meshes, 0 refused, 0 too small")
    assert "Routing: top-2 of 4" in said and "MFU:" in said
    line = next(line for line in said.splitlines() if line.startswith("1: parallel"))
    config = load_config(TINY, [*SMALL, "parallel.replicate=7", "recompute=ops", *line.split()[1:]])
    assert config.parallel.replicate == 1 and config.recompute == "none" and config.tokens_per_microbatch == 1024


def test_fewest_ranks_that_fit_and_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = tmp_path / "small.toml"
    needs = sorted(needed for _, needed, _ in everything(SMALL, 1)), sorted(n for _, n, _ in everything(SMALL, 2))
    assert needs[1][0] < needs[0][0], "two ranks need less each"
    room = (needs[0][0] + needs[1][0]) / 2 / 0.9
    base = Path(__file__).parents[2] / "configs" / "devices" / "h100.toml"
    small.write_text(f'extends = "{base}"\nmemory_gib = {room / 2**30}\n')
    plan.main(plan.parse_arguments([str(TINY), "--search", "1-4", "--device", str(small), *SMALL]))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("1 x small: nothing fits") and said[1].startswith("2 x small, fastest first")
    small.write_text(f'extends = "{base}"\nmemory_gib = 1e-6\n')
    with pytest.raises(Refusal, match=r"--search 2: nothing fits in 90% of .*try more ranks, --search 2-32"):
        plan.main(plan.parse_arguments([str(TINY), "--search", "2", "--device", str(small), *SMALL]))
