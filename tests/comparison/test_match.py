"""Arms are made alike by each measure and each number, by what others count; what cannot be is refused with the way."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from comparison.match import MatchSettings, match, measure
from comparison.resize import numbers_of, unit_of
from model.size import count, flops_per_token
from planning.device import Device, published
from run.config import RunConfig, load_config
from settings import Refusal

ROOT = Path(__file__).parents[2]
DENSE = "model.num_dense_layers=4"
BASE = (
    "model.num_layers=4",
    "model.width=128",
    "model.feed_forward_width=512",
    "model.moe={num_experts=8,experts_per_token=2,expert_width=64}",
)


@pytest.fixture(scope="module")
def device() -> Device:
    return published("h100")


def config(*overrides: str) -> RunConfig:
    return load_config(ROOT / "configs/quickstart.toml", [*BASE, *overrides])


@pytest.mark.parametrize(
    ("by", "vary"),
    [(by, vary) for by in ("active", "flops", "total", "seconds") for vary in ("inner", "width", "depth")]
    + [("total", "experts")],
)
def test_an_arm_becomes_as_large_as_another_of_its_kind(by: str, vary: str, device: Device) -> None:
    """Moved away and back: what was there is found again."""
    away = {
        "inner": "model.moe.expert_width=200",
        "width": "model.width=160",
        "depth": "model.num_layers=9",
        "experts": "model.moe.num_experts=30",
    }[vary]
    settings = MatchSettings(to="there", by=by, vary=vary, multiple_of=8, tolerance=0.05)  # type: ignore[arg-type]
    there = config()
    found = match(config(away), there, settings, device, "moe")
    assert measure(found.config, device).of(by) == pytest.approx(measure(there, device).of(by), rel=0.05)  # type: ignore[arg-type]


def test_a_mixture_as_active_as_a_dense_model(device: Device) -> None:
    """Counted by hand: two experts of half the width, beside a router of 8 rows of 128."""
    dense = config(DENSE)
    found = match(config(), dense, MatchSettings(to="dense", multiple_of=1, tolerance=0.01), device, "moe")
    assert found.config.model.moe is not None and found.config.model.moe.expert_width in (253, 254, 255, 256)
    ours, theirs = (count(each.model, 257).active for each in (found.config, dense))
    assert abs(ours / theirs - 1) < 0.002
    told = list(found.lines("moe"))
    assert told[0].startswith("moe, beside dense: model.") and "model.moe.expert_width: 64 -> 25" in told[0]
    assert [line for line in told if line.startswith("  matched")] == [
        told[1]
    ] and "parameters that a token meets" in told[1]
    assert float(told[3].split()[-1].rstrip("%")) > 100, "all parameters are left unlike, and it is said"


def test_what_comes_not_near_enough_is_refused(device: Device) -> None:
    dense = config(DENSE)
    with pytest.raises(
        Refusal, match=r"moe: with inner \d+, the nearest, .* off those of 'dense'; set match\.tolerance="
    ):
        match(config(), dense, MatchSettings(to="dense", multiple_of=200, tolerance=0.001), device, "moe")
    with pytest.raises(Refusal, match=r"'dense'; set a smaller match\.multiple_of, match\.vary='width' or 'depth'$"):
        match(config(), dense, MatchSettings(to="dense", multiple_of=100000), device, "moe")
    with pytest.raises(Refusal, match=r"; set match\.tolerance=0\.\d+, match\.vary='inner' or 'width' or 'experts'$"):
        match(config(), dense, MatchSettings(to="dense", by="total", vary="depth", tolerance=1e-9), device, "moe")
    with pytest.raises(Refusal, match="this arm has no experts; vary 'inner'"):
        match(dense, config(), MatchSettings(to="moe", by="total", vary="experts"), device, "dense")
    with pytest.raises(ValueError, match="vary='experts' hardly moves by='active'; vary 'inner'"):
        MatchSettings(to="x", vary="experts")


@st.composite
def shapes(draw: st.DrawFn) -> list[str]:
    """Overrides that make a small model of any shape: some layers dense, some of experts."""
    layers, heads = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4]))
    experts = draw(st.integers(2, 9))
    moe = {"num_experts": experts, "experts_per_token": draw(st.integers(2, experts)), "expert_width": 8}
    moe["expert_width"] *= draw(st.integers(1, 9))
    return [
        f"model.num_layers={layers}",
        f"model.num_dense_layers={draw(st.integers(0, layers))}",
        f"model.width={2 * heads * draw(st.integers(2, 12))}",
        f"model.feed_forward_width={draw(st.integers(1, 300))}",
        f"model.attention={{num_heads={heads},num_kv_heads={heads}}}",
        f"model.moe={{{','.join(f'{key}={value}' for key, value in moe.items())}}}",
    ]


@trials(max_examples=30, deadline=None)
@given(
    arms=st.tuples(shapes(), shapes()),
    how=st.sampled_from(
        [(by, vary) for by in ("active", "flops", "total") for vary in ("inner", "width", "depth")]
        + [("total", "experts")]
    ),
    unit=st.sampled_from([1, 4, 8]),
)
def test_any_two_models_are_made_alike_or_it_is_refused(
    arms: tuple[list[str], list[str]], how: tuple[str, str], unit: int
) -> None:
    """Within the tolerance as model.size counts, one number moved and no other key; else a refusal that says how."""
    ours, theirs = (load_config(ROOT / "configs/moe/softmax.toml", words) for words in arms)
    asked = MatchSettings(to="there", by=how[0], vary=how[1], multiple_of=unit, tolerance=0.1)  # type: ignore[arg-type]
    try:
        found = match(ours, theirs, asked, published("h100"), "here")
    except Refusal as refusal:
        text = str(refusal)
        assert "this arm has no experts" in text or ("here: with " in text and "match.vary=" in text), text
        advised = re.search(r"match\.tolerance=([\d.]+)", text)
        assert ("experts" in text.partition("match.vary=")[2]) <= (how[0] == "total")
        assert ("a smaller match.multiple_of" in text) == (unit > 1 and how[1] in {"inner", "width"})
        if advised:
            again = asked.model_copy(update={"tolerance": float(advised[1])})
            MatchSettings(**again.model_dump())
            match(ours, theirs, again, published("h100"), "here")
        return

    def size(one: RunConfig) -> float:
        counted = count(one.model, 257)
        (stage,) = one.stages
        each = flops_per_token(one.model, 257, stage.sequence_length)
        return {"active": counted.active, "total": counted.total, "flops": each}[how[0]]

    assert abs(size(found.config) / size(theirs) - 1) <= 0.1 + 1e-9
    before, after = numbers_of(ours), numbers_of(found.config)
    moved = {key for key in before if before[key] != after[key]}
    inner = {"model.feed_forward_width", "model.moe.expert_width"}
    allowed = {
        "inner": inner,
        "width": inner | {"model.width"},
        "depth": {"model.num_layers", "model.num_dense_layers"},
        "experts": {"model.moe.num_experts"},
    }[how[1]]
    assert moved <= allowed
    if how[1] == "width":
        assert after["model.width"] % unit_of(ours, "width", unit) == 0
    rest = {"model": ours.model}
    assert found.config.model_copy(update=rest) == ours, "nothing but the model"
