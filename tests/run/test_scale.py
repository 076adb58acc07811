"""One number divides all that a configuration counts in tokens, and is gone afterwards."""

import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from run.config import RunConfig, load_config
from run.scale import COUNTS, LENGTHS, RATES, scaled
from settings import Refusal, Section, to_dict, to_toml

TINY = Path(__file__).parents[1] / "tiny.toml"
# A busy machine is no failure.
patient = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {key: value}
    return {k: v for name, inner in items for k, v in leaves(inner, f"{key}.{name}" if key else str(name)).items()}


def test_every_number_of_tokens_is_divided_and_no_other(tmp_path: Path) -> None:
    whole = to_dict(load_config(TINY, []))
    half = to_dict(load_config(TINY, ["scale=2"]))
    before, after = leaves(whole), leaves(half)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {
        "total_tokens", "tokens_per_step", "tokens_per_microbatch", "evals.every_tokens",
        "context.stages.0.until_tokens", "context.stages.0.sequence_length",
        "context.stages.1.until_tokens", "context.stages.1.sequence_length",
        "context.stages.1.rotary.original_length", "context.stages.1.learning_rate.warmup_tokens",
        "evals.held_out.lengths.0", "evals.needle.lengths.0", "evals.needle.lengths.1",
    }  # fmt: skip
    assert all(after[key] * 2 == before[key] for key in changed)
    assert before.keys() == after.keys(), "the scale itself is gone"


def test_a_scaled_configuration_is_not_scaled_again(tmp_path: Path) -> None:
    config = load_config(TINY, ["scale=2"])
    path = tmp_path / "tiny.toml"
    path.write_text(to_toml(config))
    assert load_config(path, []) == config


def sections_of(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in typing.get_args(annotation) for section in sections_of(inner)]


@pytest.mark.parametrize("path", [*LENGTHS, *COUNTS, *RATES])
def test_every_path_leads_to_a_key_that_there_is(path: str) -> None:
    """So that a key that is renamed is not left at its size."""
    sections: list[type[Section]] = [RunConfig]
    names = [name for name in path.split(".") if name != "*" or path.startswith("evals")]
    for name in names:
        found = [s.model_fields[key] for s in sections for key in s.model_fields if name in ("*", key)]
        assert found, f"{name} of {path}"
        sections = [section for field in found for section in sections_of(field.annotation)] or sections


def test_every_path_is_changed_and_nothing_else() -> None:
    """All of them at once, in a table that is not a run's but has its shape."""
    stage = {
        "until_tokens": 80, "sequence_length": 16, "tokens_per_step": 32,
        "learning_rate": {"kind": "rewarm", "warmup_tokens": 24},
        "rotary": {"original_length": 8, "length": 16,
                   "full": {"original_length": 8, "length": 16}, "window": {"original_length": 8, "length": 16}},
        "growth": {"start": 8, "shortest": 8, "granularity": 8, "end": 16, "rate": 2.0},
        "positions": {"reach": 64}, "buckets": {"a": [{"from_tokens": 9, "share": 0.5}]},
    }  # fmt: skip
    table = {
        "scale": 8, "total_tokens": 80, "tokens_per_step": 32, "tokens_per_microbatch": 16, "seed": 8,
        "model": {
            "width": 64, "attention": {"window": 8, "temperature": {"length": 8}},
            "moe": {"balance": [{"kind": "bias"}, {"tokens": 8}]},
        },
        "context": {"stages": [stage]},
        "optimizer": {"schedule": {"warmup_tokens": 8, "decay_tokens": 9}},
        "evals": {
            "every_tokens": 12, "seed": 8, "needle": {"lengths": [16, 32], "samples": 8}, "routing": {"length": 8},
        },
    }  # fmt: skip
    after = leaves(scaled(table, "here"))
    one_rule = {"scale": 8, "model": {"moe": {"balance": {"tokens": 8}}}}
    assert scaled(one_rule, "here") == {"model": {"moe": {"balance": {"tokens": 1}}}}
    for path in {*LENGTHS, *COUNTS, *RATES} - {"model.moe.balance.tokens"}:
        found = [key for key in leaves(table) if matches(key, path)]
        assert found, path
        assert all(after[key] != leaves(table)[key] for key in found), path
    kept = {key for key, value in leaves(table).items() if after.get(key) == value}
    assert kept == {
        "seed", "model.width", "evals.seed", "evals.needle.samples", "context.stages.0.buckets.a.0.share",
        "context.stages.0.learning_rate.kind", "model.moe.balance.0.kind",
    }  # fmt: skip
    assert after["context.stages.0.buckets.a.0.from_tokens"] == 2 and after["context.stages.0.growth.rate"] == 0.25
    assert table["scale"] == 8 and stage["sequence_length"] == 16, "what was given is left alone"


def matches(key: str, path: str) -> bool:
    names, wanted = key.split("."), path.split(".")
    return len(names) == len(wanted) and all(w in ("*", n) for n, w in zip(names, wanted, strict=True))


@patient
@given(st.integers(1, 500), st.integers(1, 10_000))
def test_lengths_divide_without_a_rest_or_are_refused(scale: int, length: int) -> None:
    table = {"scale": scale, "tokens_per_step": length, "total_tokens": length}
    if length % scale:
        with pytest.raises(Refusal, match=rf"here: tokens_per_step={length} is not a multiple of scale={scale}; try "):
            scaled(table, "here")
    else:
        assert scaled(table, "here") == {"tokens_per_step": length // scale, "total_tokens": length // scale}
    rounded = scaled({"scale": scale, "total_tokens": length}, "here")["total_tokens"]
    assert (rounded - 1) * scale < length <= rounded * scale


@pytest.mark.parametrize("scale", ["0", "-2", "1.5", "true", "'big'"])
def test_a_scale_that_is_no_whole_number_is_refused(scale: str) -> None:
    with pytest.raises(Refusal, match=r"tiny\.toml: scale=.* must be a whole number, 1 or more"):
        load_config(TINY, [f"scale={scale}"])


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1.5", "1e308", str(10**400)])
@pytest.mark.parametrize("key", ["sequence_length", "until_tokens", "growth.rate"])
def test_no_number_is_too_odd_to_be_refused(key: str, value: str) -> None:
    """One key of each way to divide; where there is no scale it is the same."""
    growth = "context.stages.0.growth={kind = 'window', start = 8}"
    for scale in ("scale=1", "scale=2"):
        try:
            load_config(TINY, [growth, f"context.stages.0.{key}={value}", scale])
            assert key == "growth.rate" and value in {"1.5", "1e308"}
        except Refusal as refusal:
            assert f"context.stages.0.{key}=" in str(refusal)


def test_a_scale_that_does_not_fit_says_which_key_and_which_would() -> None:
    with pytest.raises(Refusal, match=r"context\.stages\.0\.sequence_length=64 is not a multiple of scale=3; .* or 63"):
        load_config(TINY, ["scale=3"])


def test_what_is_no_number_is_left_for_the_schema_to_refuse() -> None:
    with pytest.raises(Refusal, match=r"context\.stages\.0\.sequence_length="):
        load_config(TINY, ["scale=2", "context.stages.0.sequence_length=long"])
    assert load_config(TINY, ["scale=1"]) == load_config(TINY, [])
