"""How fast pairs turn: published numbers, and what must hold for every kind."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from context.frequencies import FREQUENCIES, frequencies, turned_channels, yarn_range
from context.rotary import (
    AbfRotary,
    DefaultRotary,
    DynamicRotary,
    LinearRotary,
    Llama3Rotary,
    LongRotary,
    NtkRotary,
    ProportionalRotary,
    RotarySpec,
    YarnRotary,
)
from settings import Refusal
from tests.context.rotations import PLAIN, SPECS, B, every_kind

yarn_16 = YarnRotary(base=B, factor=16, original_length=4096)


def slowing(spec: RotarySpec, channels: int) -> torch.Tensor:
    """What is left of each pair's speed."""
    plain = DefaultRotary(base=spec.base)
    return frequencies(spec, channels)[0].double() / frequencies(plain, channels)[0].double()


# Published numbers


@pytest.mark.parametrize(
    ("factor", "wanted"),
    [(2, 1.069315), (4, 1.138629), (8, 1.207944), (16, 1.277259), (32, 1.346574), (40, 1.368888), (1, 1.0)],
)
def test_yarn_attention_factor(factor: int, wanted: float) -> None:
    spec = YarnRotary(base=B, factor=factor, original_length=4096)
    assert frequencies(spec, 128)[1] == pytest.approx(wanted, abs=1e-6)
    assert frequencies(spec.model_copy(update={"attention_factor": 1.5}), 128)[1] == 1.5


def test_deepseek_attention_factor() -> None:
    """DeepSeek-V2-Lite has 0.707 twice, which cancels; apart, each is a coefficient of the logarithm."""
    both = {"base": B, "factor": 40, "original_length": 4096}
    assert frequencies(YarnRotary(**both, mscale=0.707, mscale_all_dim=0.707), 64)[1] == 1
    found = frequencies(YarnRotary(**both, mscale=1.0, mscale_all_dim=0.5), 64)[1]
    assert found == pytest.approx(1.368888 / 1.184444, abs=1e-6)


def test_longrope_attention_factor() -> None:
    spec = LongRotary(base=B, factor=32, original_length=4096, short=(1.0, 1.0), long=(1.0, 2.0), use="long")
    assert frequencies(spec, 4)[1] == pytest.approx(1.190238, abs=1e-6)
    assert frequencies(spec.model_copy(update={"use": "short"}), 4)[1] == frequencies(spec, 4)[1]
    assert frequencies(spec.model_copy(update={"attention_factor": 1.5}), 4)[1] == 1.5


def base_of(spec: RotarySpec, channels: int) -> float:
    return frequencies(spec, channels)[0][1].item() ** (-channels / 2)


@pytest.mark.parametrize(
    ("channels", "factor", "base"), [(128, 4, 40889.9), (128, 8, 82684.6), (128, 16, 167198.7), (64, 4, 41829.4)]
)
def test_ntk_is_a_larger_base(channels: int, factor: int, base: float) -> None:
    spec = NtkRotary(base=B, factor=factor)
    assert base_of(spec, channels) == pytest.approx(base, rel=1e-5)
    assert frequencies(spec, channels)[0][0] == 1
    assert slowing(spec, channels)[-1].item() == pytest.approx(1 / factor, rel=1e-6)


@pytest.mark.parametrize(("length", "base"), [(4096, 30527.7), (8192, 72195.9)])
def test_dynamic_is_a_base_for_a_length(length: int, base: float) -> None:
    spec = DynamicRotary(base=B, factor=2, original_length=2048, length=length)
    assert base_of(spec, 128) == pytest.approx(base, rel=1e-5)


def test_yarn_multipliers() -> None:
    places = [21, 32, 38, 46]
    assert yarn_range(yarn_16, 128) == (20, 46)
    assert yarn_range(yarn_16.model_copy(update={"truncate": False}), 128) == pytest.approx((20.94, 45.03), abs=0.005)
    by_index, by_turns = slowing(yarn_16, 128), slowing(yarn_16.model_copy(update={"ramp": "rotations"}), 128)
    assert by_index[places].tolist() == pytest.approx([0.9639, 0.5673, 0.3510, 0.0625], abs=5e-5)
    assert by_turns[places].tolist() == pytest.approx([0.9923, 0.2294, 0.1154, 0.0625], abs=5e-5)
    assert (by_index - by_turns).abs().max().item() == pytest.approx(0.344, abs=5e-4)
    for multipliers in (by_index, by_turns):
        assert (multipliers > 1 - 1e-6).sum() == 21
        assert (multipliers < 1 / 16 + 1e-6).sum() == 18


def test_yarn_ranges() -> None:
    assert yarn_range(YarnRotary(base=5e5, factor=8, original_length=8192), 128) == (18, 35)
    # Past the last pair, 7: the slope is that of a ramp which ends at 14.
    assert yarn_range(YarnRotary(base=100.0, factor=4, original_length=16_384), 16) == (7, 14)
    short = YarnRotary(base=B, factor=4, original_length=128)
    assert yarn_range(short, 32) == (0, 6)
    assert slowing(short, 32)[0] == 1
    assert slowing(short.model_copy(update={"ramp": "rotations"}), 32)[0].item() == pytest.approx(0.719, abs=5e-4)


def test_llama3_multipliers() -> None:
    multipliers = slowing(Llama3Rotary(base=5e5, factor=8, original_length=8192), 128)
    assert (multipliers > 1 - 1e-6).sum() == 29 and (multipliers < 1 / 8 + 1e-6).sum() == 29
    assert multipliers[29:35].tolist() == pytest.approx([0.8282, 0.6437, 0.4935, 0.3711, 0.2714, 0.1902], abs=5e-5)


# What must hold


def test_factor_one_changes_nothing() -> None:
    once = {"base": B, "factor": 1}
    for spec in (
        LinearRotary(**once),
        NtkRotary(**once),
        DynamicRotary(**once, original_length=128, length=128),
        YarnRotary(**once, original_length=128),
        YarnRotary(**once, original_length=128, ramp="rotations"),
        YarnRotary(**once, original_length=128, mscale=1.0, mscale_all_dim=0.5),
        Llama3Rotary(**once, original_length=128),
        LongRotary(**once, original_length=128, short=(1.0,) * 16, long=(1.0,) * 16, use="long"),
        ProportionalRotary(**once, pairs=1.0),
        AbfRotary(base=B),
        DefaultRotary(base=B, share=1.0),
    ):
        speeds, attention_factor = frequencies(spec, 32)
        assert torch.allclose(speeds, frequencies(PLAIN, 32)[0], rtol=1e-7) and attention_factor == 1.0, spec


def test_llama3_is_yarn_between_one_and_four_turns() -> None:
    llama3 = frequencies(Llama3Rotary(base=5e5, factor=8, original_length=8192), 128)[0]
    yarn = YarnRotary(base=5e5, factor=8, original_length=8192, ramp="rotations", beta_slow=1, beta_fast=4)
    assert torch.allclose(llama3, frequencies(yarn, 128)[0], rtol=1e-7)


def test_equal_lists_of_longrope_are_interpolation() -> None:
    lists = {"short": (4.0,) * 16, "long": (2.0,) * 16}
    for use, factor in (("short", 4), ("long", 2)):
        spec = LongRotary(base=B, factor=8, original_length=128, use=use, **lists)
        assert torch.equal(frequencies(spec, 32)[0], frequencies(LinearRotary(base=B, factor=factor), 32)[0])


@given(st.integers(1, 256))
@settings(max_examples=30, deadline=None)
def test_dynamic_is_the_default_up_to_the_trained_length(length: int) -> None:
    spec = DynamicRotary(base=B, factor=4, original_length=128, length=length)
    speeds = frequencies(spec, 32)[0]
    assert torch.equal(speeds, frequencies(PLAIN, 32)[0]) == (length <= 128)
    # The longer the text, the slower the pairs: all but the first.
    longer = frequencies(spec.model_copy(update={"length": max(length, 128) * 2}), 32)[0]
    assert (longer[1:] < speeds[1:]).all() and longer[0] == speeds[0] == 1


def test_proportional_turns_the_fastest_pairs_as_ever() -> None:
    plain = frequencies(PLAIN, 32)[0]
    for pairs, turning in ((1.0, 16), (0.5, 8), (0.3, 4), (0.01, 0)):
        speeds = frequencies(ProportionalRotary(base=B, pairs=pairs, factor=2), 32)[0]
        assert torch.equal(speeds[:turning], plain[:turning] / 2) and not speeds[turning:].any()


@every_kind
def test_a_share_has_the_speeds_of_a_smaller_head(spec: RotarySpec) -> None:
    if "share" not in type(spec).model_fields or spec.kind == "longrope":
        return
    whole, part = (spec.model_copy(update={"share": share}) for share in (None, 0.5))
    for ours, wanted in zip(frequencies(part, 64), frequencies(whole, 32), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(wanted))
    assert turned_channels(part, 64) == 32


@every_kind
def test_fp32_outside_fp64_inside(spec: RotarySpec) -> None:
    turned = turned_channels(spec, 32)
    exact, _ = FREQUENCIES[spec.kind](spec, turned)
    assert exact.dtype == torch.float64 and torch.equal(frequencies(spec, 32)[0], exact.float())
    assert exact.shape == (turned // 2,)
    assert (exact[1:] <= exact[:-1]).all(), "the first pair is the fastest"


def test_every_kind_is_tried_here() -> None:
    assert {spec.kind for spec in SPECS.values()} == set(FREQUENCIES)


# Refusals


def test_channels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Refusal, match=r"channels=7 must be even; try model.attention.channels=8"):
        frequencies(PLAIN, 7)
    with pytest.raises(Refusal, match=r"share=0.3 of channels=32, 9, must be even; try share=0.3125"):
        frequencies(DefaultRotary(base=B, share=0.3), 32)
    assert turned_channels(DefaultRotary(base=B, share=0.3125), 32) == 10
    with pytest.raises(Refusal, match=r"of channels=32, 0, must be even; try share=0.0625"):
        frequencies(DefaultRotary(base=B, share=0.01), 32)
    for spec in (SPECS["ntk"], SPECS["dynamic"]):
        with pytest.raises(Refusal, match=f"{spec.kind}' needs at least 4 channels"):
            frequencies(spec, 2)
    with pytest.raises(Refusal, match="has 16 factors, but a head has 32 pairs"):
        frequencies(SPECS["longrope"], 64)
    assert math.isfinite(frequencies(SPECS["longrope"], 32)[1])
