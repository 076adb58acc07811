"""Sweeps: which arms a grid and a list make, and what is said of them once they are finished."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from comparison.arms import Entry, expand, read_arms
from comparison.budgets import IsoFlopSettings
from comparison.crossed import crossed
from comparison.findings import findings
from comparison.sweep import SweepSettings, as_name, sweep_cells
from comparison.swept import lines_of, rows_of, swept
from settings import Refusal, to_toml
from tests.comparison.test_matched import BASE
from tests.words import write_words

SWEEP = """
seeds = [3, 5]
bases.a = "a.toml"
[sweep]
grid = { "optimizer.learning_rate" = [1e-3, 3e-3] }
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path)
    (tmp_path / "a.toml").write_text(BASE)
    (tmp_path / "arms.toml").write_text(SWEEP)
    return tmp_path / "arms.toml"


def runs(path: Path, *overrides: str) -> list[Entry]:
    return expand(read_arms(path, overrides), path, "t")


def finish(entry: Entry, loss: float) -> None:
    """Leave what a finished run leaves, its last rows of one loss."""
    steps = sum(stage.num_steps for stage in entry.config.stages)
    checkpoint = entry.folder / "checkpoints" / f"step_{steps:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (entry.folder / "config.toml").write_text(to_toml(entry.config))
    each = entry.config.total_tokens // steps
    rows = [
        {"step": step, "tokens": step * each, "loss": loss, "bits_per_byte": loss / 0.7, "sequence_length": 16}
        for step in range(1, steps + 1)
    ]
    (entry.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def finish_all(entries: list[Entry], loss_of: Callable[[Entry], float]) -> list[Entry]:
    for entry in entries:
        finish(entry, loss_of(entry))
    return entries


def test_a_cell_for_each_combination_and_each_of_the_list() -> None:
    grid = {"optimizer.learning_rate": (1e-3, 3e-3), "model.moe.num_experts": (4, 8)}
    found = sweep_cells(SweepSettings(grid=grid, list=({"seed": 7, "data.pack": "best_fit"},)))
    assert list(found) == [
        "learning_rate_0_001-num_experts_4",
        "learning_rate_0_001-num_experts_8",
        "learning_rate_0_003-num_experts_4",
        "learning_rate_0_003-num_experts_8",
        "seed_7-pack_best_fit",
    ]
    assert found["learning_rate_0_003-num_experts_8"] == {"optimizer.learning_rate": 3e-3, "model.moe.num_experts": 8}


def test_names_are_those_of_folders_and_tell_cells_apart() -> None:
    assert [as_name(value) for value in (1e-5, 2.5, "a b/c", True, [1, 2], 1e13, "++")] == [
        *("1e-05", "2_5", "a_b_c", "true", "1_2", "1e13", "empty")
    ]
    two = sweep_cells(SweepSettings(list=({"a.kind": "x"}, {"b.kind": "x"}, {"a.kind": "x", "b.kind": "y"})))
    assert list(two) == ["kind_x", "kind_x-again2", "a_kind_x-b_kind_y"]


def test_cells_are_laid_over_named_arms_under_every_seed(path: Path) -> None:
    assert [(entry.arm, entry.seed) for entry in runs(path)] == [
        *(("learning_rate_0_001", 3), ("learning_rate_0_003", 3)),
        *(("learning_rate_0_001", 5), ("learning_rate_0_003", 5)),
    ]
    path.write_text(SWEEP + 'arms = ["moe"]\n[arms.dense]\n[arms.moe]\nmodel.num_dense_layers = 0\n')
    found = {entry.config.name: entry.config for entry in runs(path, "seeds=[3]")}
    assert list(found) == ["t.a.3.dense", "t.a.3.moe-learning_rate_0_001", "t.a.3.moe-learning_rate_0_003"]
    assert found["t.a.3.moe-learning_rate_0_003"].optimizer.learning_rate == 3e-3
    assert [config.model.num_dense_layers for config in found.values()] == [2, 0, 0]
    assert [entry.arm for entry in runs(path, "seeds=[3]", "only=['moe']")] == [
        "moe-learning_rate_0_001",
        "moe-learning_rate_0_003",
    ]
    assert [entry.arm for entry in runs(path, "seeds=[3]", "only=['moe-learning_rate_0_003']")] == [
        "moe-learning_rate_0_003"
    ]


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("[sweep]\n", r"names no value; give grid"),
        ('[sweep]\ngrid = { "seed" = [] }', r"grid: 'seed' has no values"),
        ('[sweep]\nlist = [{ "threads" = 1 }, { "threads" = 1 }]', r'the cell \{"threads": 1\} stands twice'),
        ("[sweep]\nlist = [{}]", r"list: a cell without keys changes nothing"),
        ('[sweep]\ngrid = { "seed" = [7, 8] }', r"sweep.grid.seed: every arm runs .* write seeds = \[0, 1\]"),
        ('[sweep]\nlist = [{ "threads" = 1 }, { "name" = "b" }]', r"sweep.list.1.name: runs are named .* as --name"),
        ('[sweep]\ngrid = { "threads" = [1] }\narms = ["x"]', r"sweep.arms: no arm 'x'"),
        ('[sweep]\ngrid = { "model.widht" = [1] }', r"t.a.3.widht_1: model.widht: unknown key .*did you mean 'width'"),
        ("", r"arms: names none; add \[arms.NAME\], or a sweep"),
    ],
)
def test_what_cannot_be_swept_is_refused(path: Path, sweep: str, words: str) -> None:
    path.write_text(SWEEP[: SWEEP.index("[sweep]")] + sweep)
    with pytest.raises(Refusal, match=words):
        runs(path)


def test_two_arms_of_one_name_are_refused() -> None:
    with pytest.raises(Refusal, match="two arms would be called 'x-seed_1'; give the arm 'x-seed_1' another name"):
        crossed({"x": {}, "x-seed_1": {}}, SweepSettings(grid={"seed": (1,)}, arms=("x",)), None)
    curves = IsoFlopSettings(flops=(1e9, 2e9), sizes=(8, 16, 32))
    both = crossed({"x": {}}, SweepSettings(grid={"seed": (1, 2)}), curves)
    assert len(both) == 12 and "x-seed_2-2e09-width_16" in both and both["x-seed_2-2e09-width_16"].family == "x-seed_2"


def test_the_best_cell_is_told_as_far_as_seeds_can_tell(path: Path) -> None:
    losses = {("0_001", 3): 2.0, ("0_001", 5): 2.2, ("0_003", 3): 1.0, ("0_003", 5): 1.21}
    entries = finish_all(runs(path), lambda entry: losses[(entry.arm or "")[14:], entry.seed])
    found = swept(entries)
    assert [row["optimizer.learning_rate"] for row in rows_of(found)] == ["0.003", "0.001"]
    assert rows_of(found)[0]["loss"] == "1.1050 ±1.3342" and rows_of(found)[0]["seeds"] == "2"
    (said,) = lines_of(found)
    assert said.startswith("a: the lowest loss is learning_rate_0_003, 1.1050 ±1.3342 nats a token (the last tenth")
    assert said.endswith("learning_rate_0_001 is +0.9950 [+0.9315, +1.0585] over 2 seeds")
    (single,) = lines_of(swept(entries[:2]))
    assert "one seed gives no interval: learning_rate_0_001 is +1.0000" in single
    lines: list[str] = []
    (section,) = findings(read_arms(path, []), entries, Path("runs/t"), lines.append)
    assert section.title == "Sweep" and len(section.table) == 2 and said in lines


def test_two_cells_that_seeds_do_not_tell_apart(path: Path) -> None:
    losses = {("0_001", 3): 2.0, ("0_001", 5): 2.0, ("0_003", 3): 1.5, ("0_003", 5): 2.2}
    entries = finish_all(runs(path), lambda entry: losses[(entry.arm or "")[14:], entry.seed])
    (said,) = lines_of(swept(entries))
    assert "no evidence that it is better than learning_rate_0_001: +0.1500 [" in said


def test_nothing_is_said_of_what_is_not_finished(path: Path) -> None:
    assert findings(read_arms(path, []), runs(path), Path("runs/t"), pytest.fail) == []
