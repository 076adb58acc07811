"""The recipes of configs/context/recipes: in their own numbers what was published, and at a small size they train."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import train
from context.stages import Stages
from run import record
from run.config import RunConfig, load_config
from run.scale import scaled
from settings import read, validate

ROOT = Path(__file__).parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / "configs" / "context" / "recipes").glob("*.toml"))}
K = 1024


class Published(NamedTuple):
    """A stage as its source prints it."""

    length: int
    rows: int
    """Samples a step."""
    rotary: dict[str, Any]
    billions: float | None = None
    """Tokens; None: not printed."""
    steps: int | None = None
    peak: float | None = None


def base(number: float) -> dict[str, Any]:
    return {"base": number}


YARN_40 = {"kind": "yarn", "base": 1e4, "factor": 40.0, "original_length": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
YARN_8 = {"full": {"kind": "yarn", "base": 5e5, "factor": 8.0, "original_length": 8 * K}, "window": base(5e5)}

# arXiv 2407.21783 section 3.4; arXiv 2410.02660 table 9; OLMo-core's OLMo 3 scripts; arXiv 2501.15383 section 3;
# arXiv 2412.19437 section 4.3; the SmolLM3 blog and its training configurations.
PUBLISHED = {
    "llama3": [
        Published(8 * K, 2048, base(5e5)),
        *(Published(n * K, 2**24 // (n * K), base(5e5), billions=160) for n in (16, 32, 64)),
        Published(96 * K, 160, base(5e5), billions=160),
        Published(128 * K, 128, base(5e5), billions=160),
    ],
    "prolong": [
        Published(8 * K, 512, base(5e5)),
        Published(64 * K, 64, base(8e6), billions=20, peak=1e-5),
        Published(512 * K, 16, base(1.28e8), billions=20, peak=1e-5),
    ],
    "olmo3": [Published(8 * K, 512, base(5e5)), Published(64 * K, 64, YARN_8, billions=50, peak=2.07e-4)],
    "qwen2_5_1m": [
        Published(4 * K, 1024, base(1e4)),
        Published(32 * K, 128, base(1e6)),
        Published(64 * K, 64, base(1e6)),
        Published(128 * K, 32, base(5e6)),
        Published(256 * K, 16, base(1e7)),
    ],
    "deepseek_v3": [
        Published(4 * K, 15360, base(1e4)),
        Published(32 * K, 1920, YARN_40, steps=1000, peak=7.3e-6),
        Published(128 * K, 480, YARN_40, steps=1000, peak=7.3e-6),
    ],
    "smollm3": [
        Published(4 * K, 576, base(5e4)),
        Published(32 * K, 72, base(1.5e6), billions=50),
        Published(64 * K, 36, base(5e6), billions=50),
    ],
}


def test_every_recipe_is_here() -> None:
    assert RECIPES.keys() == {*PUBLISHED, "base"}


def contains(table: dict[str, Any], part: dict[str, Any]) -> bool:
    return all(contains(table[key], v) if isinstance(v, dict) else table[key] == v for key, v in part.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_in_its_own_numbers_it_is_what_was_published(name: str) -> None:
    stages = load_config(RECIPES[name], ["scale=1"]).stages
    assert len(stages) == len(PUBLISHED[name])
    for stage, said in zip(stages, PUBLISHED[name], strict=True):
        step = stage.step(0)
        assert (step.sequence_length, step.num_samples) == (said.length, said.rows)
        assert contains(stage.rotary.model_dump(), said.rotary), stage.rotary
        if said.billions is not None:  # a stage ends with the step that reaches its tokens
            assert abs(stage.num_tokens - said.billions * 1e9) <= stage.tokens_per_step
        assert said.steps is None or stage.num_steps == said.steps
        assert getattr(stage.settings.learning_rate, "peak", None) == said.peak


def test_rates_are_the_published_ones_at_their_ends() -> None:
    def rates(name: str, index: int) -> tuple[float, float, float]:
        stage = load_config(RECIPES[name], ["scale=1"]).stages[index]
        warm, step = stage.settings.learning_rate.warmup_tokens, stage.tokens_per_step  # type: ignore[union-attr]
        found = (stage.learning_rate(stage.start_tokens + tokens) for tokens in (step, warm or step, stage.num_tokens))
        return tuple(rate for rate in found if rate is not None)  # type: ignore[return-value]

    assert rates("deepseek_v3", 1) == rates("deepseek_v3", 2) == (7.3e-6, 7.3e-6, 7.3e-6)
    first, peak, last = rates("olmo3", 1)
    assert first == pytest.approx(2.07e-4 / 200) and peak == 2.07e-4 and last == 0.0
    first, peak, last = rates("prolong", 1)
    assert first < 1e-7 and peak == 1e-5 and last == pytest.approx(1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("scale", [1, 64, 128])
def test_one_number_changes_its_size_and_nothing_else(name: str, scale: int) -> None:
    whole, small = (load_config(RECIPES[name], [f"scale={number}"]).stages for number in (1, scale))
    for large, little in zip(whole, small, strict=True):
        assert large.sequence_length == scale * little.sequence_length
        assert large.step(0).num_samples == little.step(0).num_samples
        assert large.num_steps == little.num_steps, "where a rest is left, it is rounded up as the step is"


def write_documents(folder: Path) -> None:
    """Short ones and long ones, with which a stage's buckets can be filled."""
    letters = random.Random(0)
    texts = ["".join(letters.choice("abcdef ") for _ in range(letters.choice([90, 900]))) for _ in range(120)]
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def small(name: str, scale: int = 256) -> RunConfig:
    """The recipe at a small scale, with two steps of two rows for each stage, on a text of words."""
    table = scaled(read(RECIPES[name], [f"scale={scale}"]), name)
    until = 0
    for stage in table["context"]["stages"]:
        stage["tokens_per_step"] = 2 * stage["sequence_length"]
        until += 2 * stage["tokens_per_step"]
        stage["until_tokens"] = until
        if stage.get("learning_rate", {}).get("warmup_tokens"):
            stage["learning_rate"]["warmup_tokens"] = stage["tokens_per_step"]
        stage.pop("gate", None)
    table |= {"total_tokens": until, "name": name, "threads": 1, "device": "cpu", "precision": "fp32"}
    table["data"] = {"sources": {"words": {"kind": "text", "path": "words.jsonl"}}}
    table["evals"] = {"at_stage_ends": False}
    table["log"] = {"every_steps": 1, "tensorboard": False}
    table["model"] |= {"width": 16}
    table["optimizer"]["schedule"] = {"kind": "constant"}
    return validate(table, RunConfig, name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "write_report", lambda folder: folder)
    config = small(name)
    train.main(config)
    rows = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    stages = Stages(config.context.stages, config.tokens_per_step)
    assert [row["sequence_length"] for row in rows] == [stage.sequence_length for stage in stages for _ in range(2)]
    assert [row["stage"] for row in rows] == [stage.index for stage in stages for _ in range(2)]
