"""Arms of a file made as large as one of them: once for all seeds, the same when a comparison goes on, or refused."""

import json
import shutil
from pathlib import Path

import pytest

import compare
from comparison import launch, matched
from comparison.arms import Entry, expand, matched_lines, read_arms
from comparison.match import MatchSettings, match, measure
from comparison.matched import FILE
from comparison.timed import timed_match
from planning.device import published
from run.config import RunConfig
from settings import Refusal, to_toml
from tests.comparison.test_launch import TRAINER
from tests.words import write_words

BASE = """
total_tokens = 1024
tokens_per_step = 64
model.num_layers = 2
model.width = 16
model.num_dense_layers = 2
model.feed_forward_width = 64
model.attention = { num_heads = 2, num_kv_heads = 2 }
model.moe = { num_experts = 4, experts_per_token = 2, expert_width = 8 }
data.sources.words = { kind = "text", path = "words.txt" }
optimizer = { kind = "adamw", learning_rate = 1e-3 }

[[context.stages]]
until_tokens = 1024
sequence_length = 16
rotary = { kind = "default", base = 1e4 }
"""
ARMS = """
seeds = [3, 5]
bases.a = "a.toml"
[arms.dense]
[arms.moe]
model.num_dense_layers = 0
[match]
to = "dense"
multiple_of = 1
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A comparison of two arms; the device is a published one, so that nothing is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matched, "device_for", lambda config: published("h100"))
    write_words(tmp_path)
    (tmp_path / "a.toml").write_text(BASE)
    (tmp_path / "arms.toml").write_text(ARMS)
    (tmp_path / "trainer.py").write_text(TRAINER.replace("time.sleep(0.2)", ""))
    monkeypatch.setattr(launch, "TRAIN", tmp_path / "trainer.py")
    monkeypatch.setattr(launch, "PAUSE", 0.01)
    return tmp_path / "arms.toml"


def runs(path: Path, *overrides: str) -> dict[str, Entry]:
    return {entry.config.name: entry for entry in expand(read_arms(path, overrides), path, "t")}


def test_every_seed_has_the_size_that_was_found_for_the_first(path: Path) -> None:
    """By hand: two experts of 31 and a router of 4 rows of 16 are 3040, a layer of 64 is 3072."""
    found = runs(path)
    widths = [entry.config.model.moe.expert_width for entry in found.values() if entry.matched]  # type: ignore[union-attr]
    assert widths == [31, 31] and [entry.matched is None for entry in found.values()] == [True, False] * 2
    assert [entry.config.seed for entry in found.values()] == [3, 3, 5, 5]
    assert found["t.a.3.dense"].config.model.feed_forward_width == 64
    told = list(matched_lines(list(found.values())))
    assert told[0] == "a, moe, beside dense: model.moe.expert_width: 8 -> 31"
    assert told[1].startswith("  matched   parameters that a token meets") and told[2].startswith(
        "  unmatched operations"
    )
    assert told[-1] == (
        "  moe and dense: the same data in the same order, 1,024 tokens in 16 steps, stages, schedule and evaluations"
    )


def test_what_is_left_unlike_besides_the_size_is_told(path: Path) -> None:
    path.write_text(ARMS.replace("[match]", "optimizer.learning_rate = 2e-3\ntokens_per_step = 128\n[match]"))
    told = list(matched_lines(list(runs(path).values())))
    assert "unmatched besides size: tokens_per_step: 64 -> 128; optimizer.learning_rate: 0.001 -> 0.002" in told[-2]
    assert told[-1].strip() == "the same: tokens, stages, schedule, evaluations"


def test_arms_have_ways_of_their_own(path: Path) -> None:
    path.write_text(
        ARMS.replace(
            "[match]", "[arms.wide]\nmodel.num_layers = 3\nmodel.num_dense_layers = 3\n[match]\nvary.wide = 'width'"
        )
    )
    found = runs(path, "match.tolerance=0.3")
    dense, wide = found["t.a.3.dense"].config.model, found["t.a.3.wide"].config.model
    assert (wide.num_layers, dense.num_layers) == (3, 2) and wide.width != 16
    assert wide.width % 4 == 0, "two heads of an even number of channels"
    left = runs(path, "match.tolerance=0.3", "match.arms=['wide']")
    assert left["t.a.3.moe"].matched is None and left["t.a.3.moe"].config.model.moe.expert_width == 8  # type: ignore[union-attr]


def test_a_comparison_goes_on_with_the_sizes_that_it_began_with(path: Path, capsys: pytest.CaptureFixture) -> None:
    def call(*words: object) -> None:
        compare.main(compare.parse_arguments([str(word) for word in (path, "--name=t", *words)]))

    call("--show")
    assert "a, moe, beside dense" in capsys.readouterr().out and not Path("runs").exists()
    call()
    kept = Path("runs/t") / FILE
    table = json.loads(kept.read_text())
    (one,) = table["arms"].values()
    assert one["numbers"]["model.moe.expert_width"] == [8, 31] and "a, moe, beside dense" in capsys.readouterr().out
    one["numbers"]["model.moe.expert_width"] = [8, 33]  # as another machine's clock might have it
    kept.write_text(json.dumps(table))
    for folder in Path("runs").glob("t.*"):
        shutil.rmtree(folder)
    assert runs(path)["t.a.5.moe"].config.model.moe.expert_width == 33  # type: ignore[union-attr]
    for override in ("match.by='flops'", "every.model.width=32"):
        assert runs(path, override)["t.a.3.moe"].config.model.moe.expert_width != 33  # type: ignore[union-attr]
    before, folder = runs(path)["t.a.5.moe"], Path("runs/t.a.5.moe")
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 64}\n')
    with pytest.raises(
        Refusal, match=r"(?s)matched.json: moe on a was matched for other settings.*match.by.*another --name"
    ):
        runs(path, "match.by='flops'")
    (folder / "config.toml").write_text(to_toml(before.config))
    assert runs(path, "match.tolerance=0.5")["t.a.5.moe"].config == before.config, "nothing of it has another size"
    with pytest.raises(Refusal, match=r"(?s)was matched for other settings.*match.tolerance: .* -> 0.0001"):
        runs(path, "match.tolerance=0.0001")
    kept.write_text("{")
    with pytest.raises(Refusal, match=r"matched.json is damaged or of another version: put a good copy back"):
        runs(path)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('to = "dense"', 'to = "dens"', r"match.to: no arm 'dens'; did you mean 'dense'"),
        ('to = "dense"', 'to = "dense"\narms = ["mo"]', r"match.arms: no arm 'mo'; did you mean 'moe'"),
        ('to = "dense"', 'to = "dense"\narms = ["dense"]', r"match.arms: 'dense' is match.to"),
        ('to = "dense"', 'to = "dense"\nvary.mo = "inner"', r"match.vary: no arm 'mo'; did you mean 'moe'"),
        ('to = "dense"', 'to = "dense"\nvary.moe = "experts"', r"vary='experts' hardly moves by='active'"),
        ("seeds = [3, 5]", "branch_stage = 1", r"branch_stage=1: arms that branch .* leave branch_stage or match out"),
        ("multiple_of = 1", "multiple_of = 300", r"moe: with inner 300, the nearest"),
        ("seeds = [3, 5]", "isoflop = { flops = [1e9], sizes = [1, 2, 3] }", r"match and isoflop both set sizes"),
    ],
)
def test_what_cannot_be_matched_is_refused(path: Path, before: str, after: str, words: str) -> None:
    assert before in ARMS
    path.write_text(ARMS.replace(before, after, 1))
    with pytest.raises(Refusal, match=words):
        runs(path)
    assert not Path("runs").exists()


@pytest.mark.parametrize("slowing", [0.0, 0.5])
def test_seconds_are_those_of_timed_steps(path: Path, slowing: float) -> None:
    """A clock by which an arm's steps cost their width, and the other's 50, on a machine that gets slower and slower:
    the width is 50, and the plan is mended."""
    asked: list[int | None] = []

    def clock(config: RunConfig) -> list[float]:
        moe = config.model.moe
        width = moe.expert_width if moe and not config.model.num_dense_layers else None
        asked.append(width)
        return [(1 + slowing * ((len(asked) - 1) // 2)) * (width or 50.0)]

    found = runs(path)
    dense, moe = found["t.a.3.dense"].config, found["t.a.3.moe"].config
    settings = MatchSettings(to="dense", by="seconds", multiple_of=1, tolerance=0.02)
    made = timed_match(moe, dense, settings, published("h100"), "moe", clock, rounds=9)
    assert asked[:2] == [None, 31] and asked[-1] is None and asked[-2] in (49, 50, 51) and len(asked) > 4
    assert made.config.model.moe is not None and made.config.model.moe.expert_width == asked[-2]
    assert made.notes[0].startswith("seconds are measured: median steps of ") and "(dense) and" in made.notes[0]
    assert "timed again at the size that was found, in round" in made.notes[1]
    assert any("matched   seconds of training, as timed" in line for line in made.lines("moe"))
    asked.clear()
    plain = match(moe, dense, settings, published("h100"), "moe")
    assert measure(plain.config, published("h100")).seconds != made.measures.seconds


def test_what_takes_another_time_is_refused(path: Path) -> None:
    """A clock by which an arm takes twice as long as the other whatever its width, once the other has been timed."""
    found = runs(path)
    dense, moe = found["t.a.3.dense"].config, found["t.a.3.moe"].config
    times = iter([50.0, 50.0, *([100.0, 50.0, 100.0, 60.0] * 2)])
    settings = MatchSettings(to="dense", by="seconds", multiple_of=1)
    with pytest.raises(Refusal, match=r"as timed in round 4 of 4, and steps of 'dense' itself differ by 20.0% from"):
        timed_match(moe, dense, settings, published("h100"), "moe", lambda config: [next(times)])


def test_a_size_that_was_timed_is_kept_when_it_is_shown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def clock(config: RunConfig, threads: int) -> list[float]:
        timed.append(config.name)
        moe = config.model.moe
        return [moe.expert_width if moe and not config.model.num_dense_layers else 50.0]

    monkeypatch.setattr(matched, "time_steps", clock)
    words = [str(path), "--name=t", "--show", "match.by='seconds'"]
    compare.main(compare.parse_arguments(words))
    assert timed and "runs/t/matched.json" in str(json.loads((Path("runs/t") / FILE).read_text()))
    timed.clear()
    compare.main(compare.parse_arguments(words))
    assert not timed, "it is taken as it was shown"


def test_an_arm_of_a_sweep_is_matched_to_the_other_of_its_cell(path: Path) -> None:
    path.write_text(f'{ARMS}[sweep]\ngrid = {{ "model.feed_forward_width" = [64, 128] }}\n')
    found = {entry.arm: entry for entry in runs(path, "seeds=[3]").values()}
    widths = {arm: entry.config.model.moe.expert_width for arm, entry in found.items() if entry.matched}  # type: ignore[union-attr]
    assert widths == {"moe-feed_forward_width_64": 31, "moe-feed_forward_width_128": 63}
    assert "unmatched besides" not in "".join(matched_lines(list(found.values())))
    path.write_text(f'{ARMS}[sweep]\narms = ["moe"]\ngrid = {{ "model.moe.num_experts" = [4, 16] }}\n')
    found = {entry.arm: entry for entry in runs(path, "seeds=[3]").values()}
    widths = {arm: entry.config.model.moe.expert_width for arm, entry in found.items() if entry.matched}  # type: ignore[union-attr]
    assert widths == {"moe-num_experts_4": 31, "moe-num_experts_16": 29}, "a router of 16 rows leaves less"
