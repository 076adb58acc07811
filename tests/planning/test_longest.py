"""The longest rows that fit: they do, and longer ones do not."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

import plan
from context.stages import Stage
from planning.device import Device, published
from planning.longest import FILL, UNIT, Longest, Ranks, greatest, longest_of, unit_of, with_length
from run.config import RunConfig, load_config, rows_of_step
from run.needs import microbatches_of, needs_of
from settings import Refusal

TINY = Path(__file__).parents[1] / "tiny.toml"
VOCAB_SIZE = 257


def device(mebibytes: float) -> Device:
    return replace(published("h100"), memory=int(mebibytes * 2**20))


def needed(config: RunConfig, stage: Stage, length: int, ranks: Ranks) -> int:
    given = with_length(config, stage, length, ranks.number)
    return needs_of(given, VOCAB_SIZE, given.stages[0].longest_step(), ranks.number, ranks.device.numbers).total


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        ((), 1),
        (("recompute=full",), 1),
        (("parallel.shard=2",), 2),
        (("parallel.context=3",), 3),
        (("parallel.context=2", "parallel.tensor=2", "model.attention.num_kv_heads=2"), 4),
        (("parallel.pipeline=2", "tokens_per_microbatch=128"), 2),
    ],
)
@pytest.mark.parametrize("mebibytes", [20.0, 77.7])
def test_it_fits_and_the_next_does_not(overrides: tuple[str, ...], number: int, mebibytes: float) -> None:
    config, ranks = load_config(TINY, list(overrides)), Ranks(number, device(mebibytes))
    for stage in config.stages:
        found, unit = longest_of(config, stage, VOCAB_SIZE, ranks), unit_of(config, stage)
        assert isinstance(found, Longest) and found.length % unit == 0 and unit % UNIT == 0
        assert found.needed.total == needed(config, stage, found.length, ranks) <= FILL * ranks.device.memory  # type: ignore[operator]
        assert needed(config, stage, found.length + unit, ranks) > FILL * ranks.device.memory  # type: ignore[operator]
        assert found.largest[1] == max(v for k, v in vars(found.needed).items())
        assert found.step.seconds > 0


def test_recomputation_and_ranks_to_a_row_make_room() -> None:
    def length(*overrides: str, number: int = 1) -> int:
        config = load_config(TINY, list(overrides))
        found = longest_of(config, config.stages[1], VOCAB_SIZE, Ranks(number, device(50)))
        assert isinstance(found, Longest)
        return found.length

    plain, again, full = (length(f"recompute={way}") for way in ("none", "ops", "full"))
    assert plain < again < full
    assert 1.6 * plain < length("parallel.context=2", number=2) <= 2.2 * plain


def test_where_nothing_fits_it_is_said_what_the_least_would_need() -> None:
    config = load_config(TINY, [])
    found = longest_of(config, config.stages[0], VOCAB_SIZE, Ranks(1, device(0.01)))
    assert found == needed(config, config.stages[0], UNIT, Ranks(1, device(0.01)))
    with pytest.raises(Refusal, match="nothing is known of the memory of h100; name a device"):
        longest_of(config, config.stages[0], VOCAB_SIZE, Ranks(1, replace(published("h100"), memory=None)))


@pytest.mark.parametrize(("pipeline", "often"), [(1, 4), (4, 4)])
def test_a_step_is_one_row_a_micro_batch_and_keeps_its_tokens_where_it_can(pipeline: int, often: int) -> None:
    config = load_config(TINY, ["tokens_per_step=2048", "total_tokens=6144"])
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"pipeline": pipeline})})
    given = with_length(config, config.stages[0], 256, 2 * pipeline)
    step = given.stages[0].longest_step()
    assert step.num_tokens == often * 256 * 2 and rows_of_step(given, step, 2) == 1
    longer = with_length(config, config.stages[0], 4096, 2 * pipeline)
    step = longer.stages[0].longest_step()
    assert step.num_tokens == pipeline * 4096 * 2
    from parallel.mesh import grid_of

    assert microbatches_of(longer, step, grid_of(longer.parallel, 2 * pipeline)) == pipeline


def test_the_greatest_number_is_found() -> None:
    draws = random.Random(0)
    for _ in range(200):
        last, most = draws.randint(0, 300), draws.randint(1, 250)
        assert greatest(lambda number, last=last: number <= last, most) == min(last, most)  # type: ignore[misc]


def test_what_plan_prints(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(plan.parse_arguments([str(TINY), "--longest", "--device", "h100", "recompute=ops"]))
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("stage"))
    assert "recompute" in head and "most of it" in head and "MFU" in head and "limited by" in head
    first = lines[lines.index(head) + 1].split()
    assert first[:2] == ["0", "ops"] and int(first[6].replace(",", "")) % UNIT == 0
    assert any(line.startswith("Routing: top-2 of 4") for line in lines)
