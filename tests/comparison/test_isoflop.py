"""IsoFLOP curves: runs that take their budget, and the size that is found again where it was put."""

import csv
import math
from pathlib import Path

import pytest

from comparison.arms import Entry, read_arms
from comparison.budgets import lasting
from comparison.findings import findings
from comparison.isoflop import COLUMNS, lines_of, rows_of, sized_runs, valleys
from comparison.match import flops_of
from model.size import count
from scaling.runs import read_csv
from settings import Refusal
from tests.comparison.test_sweep import finish_all, path, runs

__all__ = ["path"]
CURVES = """
bases.a = "a.toml"
[arms.dense]
[arms.moe]
model.num_dense_layers = 0
[isoflop]
flops = [5e8, 2e9]
sizes = [8, 16, 24, 32]
"""


@pytest.fixture
def entries(path: Path) -> list[Entry]:
    path.write_text(CURVES)
    return runs(path, "every.data.tokenizer={ kind = 'byte' }")


def active_of(entry: Entry) -> int:
    return count(entry.config.model, 257).active


def bottom_of(entry: Entry) -> float:
    """Where the least loss is put: four times the FLOPs, twice the size."""
    assert entry.plan is not None and entry.plan.point is not None
    return 8000 * math.sqrt(entry.plan.point.flops / 5e8) * (0.8 if entry.plan.arm == "moe" else 1)


def test_runs_take_their_budget_to_half_a_step(entries: list[Entry]) -> None:
    assert len(entries) == 2 * 2 * 4
    for entry in entries:
        assert entry.plan is not None and entry.plan.point is not None
        config, point = entry.config, entry.plan.point
        step = flops_of(config) / config.total_tokens * config.tokens_per_step
        assert abs(flops_of(config) - point.flops) <= 0.51 * step
        assert config.model.width == point.size and config.context.stages[-1].until_tokens == config.total_tokens
    names = [entry.arm for entry in entries]
    assert names[0] == "dense-5e08-width_8" and names[-1] == "moe-2e09-width_32"
    assert entries[1].config.model.feed_forward_width == 64 and entries[0].config.model.feed_forward_width == 32


def test_all_that_counts_tokens_stays_the_same_share(path: Path) -> None:
    stage = "sequence_length = 16\n"
    second = (
        'rotary = { kind = "default", base = 1e4 }\n[[context.stages]]\nuntil_tokens = 2048\nsequence_length = 32\n'
    )
    warm = "learning_rate = { kind = 'rewarm', peak = 1e-3, warmup_tokens = 256 }\n"
    base = Path("a.toml").read_text().replace("total_tokens = 1024", "total_tokens = 2048", 1)
    schedule = "schedule = { kind = 'cosine', warmup_tokens = 128 } }"
    base = base.replace("learning_rate = 1e-3 }", f"learning_rate = 1e-3, {schedule}")
    Path("a.toml").write_text("evals.every_tokens = 512\n" + base.replace(stage, stage + second + warm))
    path.write_text(CURVES[: CURVES.index("[isoflop]")])
    config = lasting(runs(path)[0].config, 10_000, "x")
    assert [each.until_tokens for each in config.context.stages] == [78 * 64, 156 * 64] and config.total_tokens == 9984
    assert (
        config.optimizer.schedule.warmup_tokens == 625 and config.context.stages[1].learning_rate.warmup_tokens == 1250
    )  # type: ignore[union-attr]
    assert config.evals.every_tokens == 2500
    with pytest.raises(Refusal, match=r"x: 300 tokens are left for this size, 2 steps of context.stages.0; give more"):
        lasting(runs(path)[0].config, 300, "x")


def test_the_size_of_least_loss_is_found_where_it_was_put(entries: list[Entry], path: Path) -> None:
    finish_all(entries, lambda entry: 3 + 0.1 * math.log(active_of(entry) / bottom_of(entry)) ** 2)
    curves = valleys(sized_runs(entries))
    assert [(each.family, each.budget, each.expansion) for each in curves.optima] == [
        *(("dense", 5e8, 1), ("moe", 5e8, 2), ("dense", 2e9, 1), ("moe", 2e9, 2))
    ]
    for each, wanted in zip(curves.optima, (8000, 6400, 16_000, 12_800), strict=True):
        assert each.valley is not None and each.valley.size == pytest.approx(wanted, rel=1e-3)
        assert each.valley.loss == pytest.approx(3, abs=1e-4)
        near = min(each.runs, key=lambda run: abs(math.log(run.active / wanted)))
        assert each.at_best("tokens") == pytest.approx(near.tokens * near.active / wanted, rel=0.25)
        assert each.at_best("total") >= 0.999 * each.valley.size
    said = list(lines_of(curves))
    assert said[0].startswith("a, dense: active = ") and "C^0.500 over 2 budgets: two points, so no error" in said[0]
    (section,) = findings(read_arms(path, []), entries, Path("runs/t"), lambda line: None)
    assert len(section.pictures) == 1 and len(section.table) == 4 and Path("runs/t/isoflop-a.png").stat().st_size > 5000
    table = read_csv(Path("runs/t/isoflop.csv"))
    assert len(table) == 16 and set(table.expansion_R) == {1.0, 2.0} and table.loss_R.min() < 3.01
    with Path("runs/t/isoflop.csv").open() as file:
        assert tuple(next(csv.reader(file))) == COLUMNS


def test_a_lowest_point_beyond_the_sizes_is_none(entries: list[Entry]) -> None:
    dense = [entry for entry in entries if entry.plan is not None and entry.plan.arm == "dense"]
    finish_all(dense, lambda entry: 3 + 0.1 * math.log(active_of(entry) / 1e6) ** 2)
    curves = valleys(sized_runs(dense))
    assert all(
        each.valley is None and "beyond the sizes that were run: add larger ones" in each.note for each in curves.optima
    )
    assert [row["active"] for row in rows_of(curves)] == ["-", "-"] and not list(lines_of(curves))
    few = valleys(sized_runs(dense[:2]))
    assert "2 sizes make no parabola" in few.optima[0].note


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("isoflop.sizes=[8, 16]", r"isoflop.sizes.*at least 3"),
        ("isoflop.sizes=[8, 16, 16]", r"names one twice; seeds are how a run is repeated"),
        ("isoflop.flops=[4e9, 4000000001.0]", r"values too near each other to be told apart in a run's name"),
        ("isoflop.flops=[-1.0]", r"must all be above 0"),
        ("isoflop.flops=[1e6]", r"t.a.0.dense-1e06-width_8: [\d,]+ tokens are left for this size"),
        ("isoflop.sizes=[8, 16, 17]", r"t.a.0.dense-5e08-width_17: .*num_heads=2 must divide width=17"),
        ("branch_stage=1", r"leave branch_stage or isoflop out"),
    ],
)
def test_what_makes_no_curve_is_refused(path: Path, key: str, words: str) -> None:
    path.write_text(CURVES)
    with pytest.raises(Refusal, match=words):
        runs(path, key)
