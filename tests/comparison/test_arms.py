"""A comparison's file: which runs it makes, and what is refused before one of them starts."""

from pathlib import Path

import pytest

from comparison.arms import Entry, expand, read_arms
from comparison.overlay import laid_over, with_keys
from run.config import load_config
from settings import Refusal, to_toml

ROOT = Path(__file__).parents[2]

BASE = """
total_tokens = 192
tokens_per_step = 64
model = { num_layers = 1, width = 16, feed_forward_width = 16, attention = { num_heads = 2, num_kv_heads = 2 } }
data.sources.words = { kind = "text", path = "words.txt" }
optimizer = { kind = "adamw", learning_rate = 1e-3 }

[[context.stages]]
until_tokens = 128
sequence_length = 16
rotary = { kind = "default", base = 1e4 }

[[context.stages]]
until_tokens = 192
sequence_length = 64
rotary = { kind = "default", base = 1e4 }
"""
ARMS = """
branch_stage = 1
seeds = [3, 5]
every.evals.at_stage_starts = true
base.evals.every_tokens = 64

[bases]
a = "a.toml"
b = "b.toml"

[arms.none]

[arms.yarn]
context.stages.1.rotary = { kind = "yarn", base = 1e4, factor = 4.0, original_length = 16 }

[[claims]]
above = ["yarn"]
below = ["none"]
length = 64

[small]
seeds = [0]
every.total_tokens = 128
every.context.stages.0.until_tokens = 64
every.context.stages.1.until_tokens = 128
"""


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a comparison of two arms on two bases; runs/ lies beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text(BASE)
    (tmp_path / "b.toml").write_text('extends = "a.toml"\nmodel.width = 32\n')
    path = tmp_path / "arms.toml"
    path.write_text(ARMS)
    return path


def runs(path: Path, *overrides: str, is_small: bool = False) -> dict[str, Entry]:
    entries = expand(read_arms(path, overrides, is_small=is_small), path, "t")
    return {entry.config.name: entry for entry in entries}


def test_every_arm_on_every_base_under_every_seed_after_the_run_it_branches_from(comparison: Path) -> None:
    found = runs(comparison)
    wanted = [f"t.{b}.{seed}{arm}" for b in "ab" for seed in (3, 5) for arm in ("", ".none", ".yarn")]
    assert list(found) == wanted
    for name, entry in found.items():
        _, base, seed, *arm = name.split(".")
        config = entry.config
        assert (entry.base, entry.seed, entry.arm) == (base, int(seed), arm[0] if arm else None)
        assert config.seed == int(seed) and config.model.width == {"a": 16, "b": 32}[base]
        assert config.evals.at_stage_starts and config.evals.every_tokens == (None if arm else 64)
        assert len(config.context.stages) == (2 if arm else 1) and config.total_tokens == (192 if arm else 128)
        if arm:
            assert (config.branch.run, config.branch.stage) == (f"runs/t.{base}.{seed}", 1)
            assert config.context.stages[1].rotary.kind == ("yarn" if arm == ["yarn"] else "default")
            assert config.context.stages[0].rotary.kind == "default"
        else:
            assert config.branch is None
        assert entry.folder == Path("runs") / name


def test_without_a_branch_arms_train_from_their_start(comparison: Path) -> None:
    comparison.write_text(ARMS.replace("branch_stage = 1", ""))
    found = runs(comparison)
    assert list(found) == [f"t.{base}.{seed}.{arm}" for base in "ab" for seed in (3, 5) for arm in ("none", "yarn")]
    assert all(entry.config.branch is None and len(entry.config.context.stages) == 2 for entry in found.values())


def test_small_only_and_overrides(comparison: Path) -> None:
    small = runs(comparison, is_small=True)
    assert {entry.seed for entry in small.values()} == {0}
    assert {entry.config.total_tokens for entry in small.values()} == {64, 128}
    assert list(runs(comparison, "seeds=[7]", 'only=["b", "yarn"]')) == ["t.b.7", "t.b.7.yarn"]
    assert list(runs(comparison, "seeds=[7]", 'only=["none"]')) == ["t.a.7", "t.a.7.none", "t.b.7", "t.b.7.none"]
    changed = runs(comparison, "arms.yarn.context.stages.1.rotary.factor=8.0")
    assert changed["t.a.3.yarn"].config.context.stages[1].rotary.factor == 8


def test_tables_of_one_kind_are_merged_and_items_reached_by_number() -> None:
    old = {"list": [{"a": 1, "b": 2}, {"a": 3}], "x": {"kind": "p", "y": 1}}
    assert laid_over(old, {"list": {"1": {"a": 4}}}, "")["list"] == [{"a": 1, "b": 2}, {"a": 4}]
    assert laid_over(old, {"list": [1]}, "")["list"] == [1]
    assert laid_over(old, {"x": {"z": 2}}, "")["x"] == {"kind": "p", "y": 1, "z": 2}
    assert laid_over(old, {"x": {"kind": "p", "z": 2}}, "")["x"] == {"kind": "p", "y": 1, "z": 2}
    assert laid_over(old, {"x": {"kind": "q", "z": 2}}, "")["x"] == {"kind": "q", "z": 2}
    assert old == {"list": [{"a": 1, "b": 2}, {"a": 3}], "x": {"kind": "p", "y": 1}}, "left as it was"


def test_a_key_in_quotes_takes_the_place_of_a_whole_table(comparison: Path) -> None:
    """So that what a base says can be taken back; the same key without quotes is merged with it."""
    sources = "".join(f'data.sources.{name} = {{ kind = "text", path = "{name}.txt" }}\n' for name in "pq")
    stage = "sequence_length = 64\nmixture = { p = 0.5, q = 0.5 }\nbuckets.p = [{ from_tokens = 2, share = 1.0 }]\n"
    Path("a.toml").write_text(sources + BASE.replace("sequence_length = 64\n", stage))
    comparison.write_text(
        ARMS.replace(
            "[arms.none]",
            """[arms.merged]
context.stages.1.mixture = { p = 1.0 }
[arms.whole]
"context.stages.1.mixture" = { p = 1.0 }
"context.stages.1.buckets" = {}
context.stages.1.sequence_length = 32
[arms.none]""",
        )
    )
    found = runs(comparison, "seeds=[0]", "only=['a']")
    arms = {name: found[f"t.a.0.{name}"].config.context.stages[1] for name in ("none", "merged", "whole")}
    assert arms["none"].mixture == {"p": 0.5, "q": 0.5} and list(arms["none"].buckets) == ["p"]
    assert arms["merged"].mixture == {"p": 1.0, "q": 0.5} and list(arms["merged"].buckets) == ["p"]
    assert arms["whole"].mixture == {"p": 1.0} and arms["whole"].buckets == {}
    assert arms["whole"].sequence_length == 32 and arms["whole"].rotary == arms["none"].rotary


def test_what_is_put_stands_at_its_path_and_nothing_else_changes() -> None:
    old = {"a": [{"b": {"c": 1}, "d": 2}, {"d": 3}], "e": 4}
    assert with_keys(old, {"a.0.b": {"x": 1}}, "") == {"a": [{"b": {"x": 1}, "d": 2}, {"d": 3}], "e": 4}
    assert with_keys(old, {"a": {"0": {"b": {"x": 1}}}}, "")["a"][0]["b"] == {"c": 1, "x": 1}
    assert with_keys(old, {"f.kind": "g"}, "")["f"] == {"kind": "g"}
    assert old == {"a": [{"b": {"c": 1}, "d": 2}, {"d": 3}], "e": 4}, "left as it was"
    for unknown in ("2", "01", "x"):
        with pytest.raises(Refusal, match=rf"arms.q.a.{unknown}: is no item of an array of 2; use a number below 2"):
            with_keys(old, {f"a.{unknown}.d": 5}, "arms.q")


def test_a_base_with_a_scale_is_divided_once_arms_are_laid_over_it(comparison: Path) -> None:
    """Twice of all that counts tokens, under scale 2, are the same runs."""
    plain = {name: entry.config for name, entry in runs(comparison).items()}
    twice = {"192": "384", "128": "256", "= 64": "= 128", "= 16\nro": "= 32\nro", "= 16 }": "= 32 }"}
    model = next(line for line in BASE.splitlines() if line.startswith("model"))
    base, arms = "scale = 2\n" + BASE.replace(model, "MODEL"), ARMS
    for before, after in twice.items():
        base, arms = base.replace(before, after), arms.replace(before, after)
    Path("a.toml").write_text(base.replace("MODEL", model))
    comparison.write_text(arms)
    assert {name: entry.config for name, entry in runs(comparison).items()} == plain


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "context" / "recipes").glob("*.toml")), ids=lambda p: p.stem
)
def test_every_recipe_can_be_a_base(comparison: Path, path: Path) -> None:
    comparison.write_text(f'bases.recipe = "{path}"\n[arms.plain]\n[arms.seeded]\ndata.pack = "best_fit"\n')
    found = runs(comparison)
    assert found["t.recipe.0.plain"].config == load_config(path, ["name=t.recipe.0.plain"])


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            "context.stages.1.rotary",
            "context.stages.2.rotary",
            r"arms.yarn.context.stages.2: is no item of an array of 2",
        ),
        ('kind = "yarn"', 'kind = "yarm"', r"t.a.3.yarn: context.stages.1.rotary.kind: unknown kind 'yarm'"),
        ("context.stages.1.rotary", "context.stages.0.rotary", r"arms.yarn: changes what its base does before stage 1"),
        ("branch_stage = 1", "branch_stage = 2", r"branch_stage=2: the base has 2 stages, 0 to 1"),
        ('above = ["yarn"]', 'above = ["yarm"]', r"claims: no arm 'yarm'; did you mean 'yarn'"),
        ("seeds = [3, 5]", "seeds = [3, 3]", r"seeds=\[3, 3\] names one twice"),
        ("[arms.none]", '[arms."no.ne"]', r"'no.ne' names a run's folder"),
        ('b = "b.toml"', 'b = "c.toml"', r"c.toml: no such configuration file"),
        ("seeds = [3, 5]", 'seeds = [3]\nonly = ["yarm"]', r"only: no base and no arm 'yarm'; did you mean 'yarn'"),
        ("seeds = [3, 5]", "seed = 3", r"seed: unknown key"),
        ("[arms.none]", "[arms.none]\nseed = 7", r"arms.none.seed: every arm runs under every seed.*seeds = \[0, 1\]"),
        ("[arms.yarn]", "[arms.yarn]\nname = 'x'", r"arms.yarn.name: runs are named for .* --name"),
        ("seeds = [3, 5]", "seeds = [3, 5]\nevery.seed = 7", r"every.seed: every arm runs under every seed"),
        ("seeds = [3, 5]", "seeds = [3, 5]\nevery.name = 'x'", r"every.name: runs are named for"),
        ("base.evals.every_tokens = 64", "base.seed = 7", r"base.seed: every arm runs under every seed"),
        ("seeds = [3, 5]", "seeds = [3]\nevery.context = 3", r"context.stages of the base must be an array of tables"),
    ],
)
def test_what_cannot_be_is_refused_before_a_run_starts(comparison: Path, before: str, after: str, words: str) -> None:
    assert before in ARMS
    comparison.write_text(ARMS.replace(before, after, 1))
    with pytest.raises(Refusal, match=words):
        runs(comparison)
    assert not Path("runs").exists()


def test_a_small_comparison_must_be_described(comparison: Path) -> None:
    comparison.write_text(ARMS[: ARMS.index("[small]")])
    with pytest.raises(Refusal, match=r"has no table \[small\]"):
        runs(comparison, is_small=True)


def test_a_folder_of_another_run_is_refused(comparison: Path) -> None:
    folder = Path("runs/t.b.5.yarn")
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        Refusal, match=r"runs/t.b.5.yarn: is not empty and holds no config.toml.*another --name$"
    ) as refused:
        runs(comparison)
    assert "--fresh" not in str(refused.value), "which compare.py has not"


def test_finished_is_the_last_steps_checkpoint(comparison: Path) -> None:
    entry = runs(comparison)["t.a.3.yarn"]
    assert not entry.is_finished
    for step, is_finished in ((2, False), (3, True)):
        checkpoint = entry.folder / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
        assert entry.is_finished == is_finished
    assert to_toml(entry.config)
