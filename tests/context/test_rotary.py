"""Rotary position: published numbers, another library's numbers, and what must hold for every kind."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from context.rotary import (
    AbfRotary,
    DefaultRotary,
    LinearRotary,
    Llama3Rotary,
    NoRotary,
    NtkRotary,
    Rotary,
    RotarySpec,
    YarnRotary,
    frequencies,
    yarn_range,
)
from settings import Refusal

B = 1e4
SPECS = [
    DefaultRotary(base=B),
    LinearRotary(base=B, factor=4),
    NtkRotary(base=B, factor=4),
    YarnRotary(base=B, factor=4, original_length=128),
    YarnRotary(base=B, factor=4, original_length=128, ramp="rotations"),
    Llama3Rotary(base=B, factor=4, original_length=128),
    AbfRotary(base=50 * B),
    NoRotary(),
]
by_kind = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)


def slowing(spec: RotarySpec, channels: int) -> torch.Tensor:
    """What is left of each pair's speed."""
    return frequencies(spec, channels)[0].double() / frequencies(DefaultRotary(base=spec.base), channels)[0].double()


# Published numbers


@pytest.mark.parametrize(
    ("factor", "wanted"),
    [(2, 1.069315), (4, 1.138629), (8, 1.207944), (16, 1.277259), (32, 1.346574), (40, 1.368888), (1, 1.0)],
)
def test_attention_factor(factor: int, wanted: float) -> None:
    spec = YarnRotary(base=B, factor=factor, original_length=4096)
    assert frequencies(spec, 128)[1] == pytest.approx(wanted, abs=1e-6)
    assert frequencies(spec.model_copy(update={"attention_factor": 1.5}), 128)[1] == 1.5


@pytest.mark.parametrize(
    ("channels", "factor", "base"), [(128, 4, 40889.9), (128, 8, 82684.6), (128, 16, 167198.7), (64, 4, 41829.4)]
)
def test_ntk_is_a_larger_base(channels: int, factor: int, base: float) -> None:
    speeds = frequencies(NtkRotary(base=B, factor=factor), channels)[0]
    assert speeds[1].item() ** (-channels / 2) == pytest.approx(base, rel=1e-4)
    assert speeds[0] == 1
    slow = slowing(NtkRotary(base=B, factor=factor), channels)
    assert slow[-1].item() == pytest.approx(1 / factor, rel=1e-6)


def test_yarn_multipliers() -> None:
    spec = YarnRotary(base=B, factor=16, original_length=4096)
    places = [21, 32, 38, 46]
    assert yarn_range(spec, 128) == (20, 46)
    assert yarn_range(spec.model_copy(update={"truncate": False}), 128) == pytest.approx((20.94, 45.03), abs=0.005)
    by_index, by_turns = slowing(spec, 128), slowing(spec.model_copy(update={"ramp": "rotations"}), 128)
    assert by_index[places].tolist() == pytest.approx([0.9639, 0.5673, 0.3510, 0.0625], abs=5e-5)
    assert by_turns[places].tolist() == pytest.approx([0.9923, 0.2294, 0.1154, 0.0625], abs=5e-5)
    assert (by_index - by_turns).abs().max().item() == pytest.approx(0.344, abs=5e-4)
    for multipliers in (by_index, by_turns):
        assert (multipliers > 1 - 1e-6).sum() == 21
        assert (multipliers < 1 / 16 + 1e-6).sum() == 18


def test_yarn_ranges() -> None:
    assert yarn_range(YarnRotary(base=5e5, factor=8, original_length=8192), 128) == (18, 35)
    short = YarnRotary(base=B, factor=4, original_length=128)
    assert yarn_range(short, 32) == (0, 6)
    assert slowing(short, 32)[0] == 1
    assert slowing(short.model_copy(update={"ramp": "rotations"}), 32)[0].item() == pytest.approx(0.719, abs=5e-4)


def test_llama3_multipliers() -> None:
    multipliers = slowing(Llama3Rotary(base=5e5, factor=8, original_length=8192), 128)
    assert (multipliers > 1 - 1e-6).sum() == 29 and (multipliers < 1 / 8 + 1e-6).sum() == 29
    assert multipliers[29:35].tolist() == pytest.approx([0.8282, 0.6437, 0.4935, 0.3711, 0.2714, 0.1902], abs=5e-5)


# Another library's numbers

THEIR_NAMES = {
    "original_length": "original_max_position_embeddings",
    "base": "rope_theta",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
}
bases = st.floats(100, 1e7)
factors = st.floats(1, 64)
original = st.integers(16, 16384)
random_specs = st.one_of(
    st.builds(LinearRotary, base=bases, factor=factors),
    st.builds(
        YarnRotary,
        base=bases,
        factor=factors,
        original_length=original,
        beta_fast=st.floats(4, 64),
        beta_slow=st.floats(0.25, 2),
        truncate=st.booleans(),
        attention_factor=st.none() | st.floats(0.5, 2),
    ),
    st.builds(
        Llama3Rotary,
        base=bases,
        factor=factors,
        original_length=original,
        low_frequency_factor=st.floats(0.5, 1.5),
        high_frequency_factor=st.floats(2, 8),
    ),
)


@settings(max_examples=150, deadline=None)
@given(random_specs, st.sampled_from([16, 32, 64, 128]))
def test_equals_transformers(spec: RotarySpec, channels: int) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[spec.kind]
    fields = spec.model_dump(exclude={"kind", "ramp"}, exclude_none=True)
    parameters = {"rope_type": spec.kind} | {THEIR_NAMES.get(name, name): value for name, value in fields.items()}
    length = fields.get("original_length", 4096)
    config = transformers.LlamaConfig(
        hidden_size=channels, num_attention_heads=1, max_position_embeddings=length, rope_parameters=parameters
    )
    wanted, attention_factor = theirs(config, "cpu")
    got, ours = frequencies(spec, channels)
    assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-6)
    assert ours == pytest.approx(attention_factor, abs=1e-12)


@by_kind
def test_rotation_equals_transformers(spec: RotarySpec) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, positions = torch.randn(2, 9, 3, 16), torch.randint(0, 500, (2, 9))
    speeds, factor = frequencies(spec, 16)
    angles = torch.cat([positions[..., None] * speeds] * 2, dim=-1)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    wanted, _ = llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    assert torch.allclose(Rotary(spec, 16).at(positions)(x), wanted, atol=1e-4)


# What must hold


@pytest.mark.parametrize("ramp", ["index", "rotations"])
def test_factor_one_changes_nothing(ramp: str) -> None:
    wanted = frequencies(DefaultRotary(base=B), 32)[0]
    for spec in (
        LinearRotary(base=B, factor=1),
        NtkRotary(base=B, factor=1),
        YarnRotary(base=B, factor=1, original_length=128, ramp=ramp),
        Llama3Rotary(base=B, factor=1, original_length=128),
        AbfRotary(base=B),
    ):
        speeds, attention_factor = frequencies(spec, 32)
        assert torch.allclose(speeds, wanted, rtol=1e-7) and attention_factor == 1.0


def test_interpolation_is_position_divided_by_the_factor() -> None:
    x, positions = torch.randn(1, 50, 2, 32), torch.arange(0, 200, 4)[None]
    squeezed = Rotary(LinearRotary(base=B, factor=4), 32).at(positions)(x)
    assert torch.allclose(squeezed, Rotary(DefaultRotary(base=B), 32).at(positions // 4)(x), atol=1e-5)


def test_llama3_is_yarn_between_one_and_four_turns() -> None:
    llama3 = frequencies(Llama3Rotary(base=5e5, factor=8, original_length=8192), 128)[0]
    yarn = YarnRotary(base=5e5, factor=8, original_length=8192, ramp="rotations", beta_slow=1, beta_fast=4)
    assert torch.allclose(llama3, frequencies(yarn, 128)[0], rtol=1e-7)


@by_kind
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100_000), st.integers(0, 2000))
def test_scores_depend_on_distance_only(spec: RotarySpec, shift: int, distance: int) -> None:
    generator = torch.Generator().manual_seed(distance)
    q, k = torch.randn(2, 1, 1, 1, 32, generator=generator)
    rotary = Rotary(spec, 32)

    def score(first: int, second: int) -> float:
        return (rotary.at(torch.tensor([[first]]))(q) * rotary.at(torch.tensor([[second]]))(k)).sum().item()

    assert score(shift + distance, shift) == pytest.approx(score(distance, 0), abs=1e-4)


@by_kind
def test_attention_factor_is_on_cos_and_sin(spec: RotarySpec) -> None:
    x, positions = torch.randn(2, 7, 3, 32), torch.randint(0, 1000, (2, 7))
    rotary = Rotary(spec, 32)
    rotated = rotary.at(positions)(x)
    expected = 0.1 * math.log(4) + 1 if spec.kind == "yarn" else 1.0
    assert torch.allclose(rotated.norm(dim=-1), expected * x.norm(dim=-1), rtol=1e-5)
    rotation = rotary.at(positions)
    if spec.kind != "none":
        squares = rotation.cos_BT1P.square() + rotation.sin_BT1P.square()
        assert torch.allclose(squares, torch.tensor(expected**2), rtol=1e-6)
        assert rotation.cos_BT1P.dtype == torch.float32


def test_none_is_the_identity() -> None:
    x = torch.randn(2, 7, 3, 32)
    assert Rotary(NoRotary(), 32).at(torch.arange(7).expand(2, 7))(x) is x


@by_kind
def test_position_zero_only_scales(spec: RotarySpec) -> None:
    x = torch.randn(1, 1, 2, 16)
    rotary = Rotary(spec, 16)
    assert torch.allclose(rotary.at(torch.zeros(1, 1, dtype=torch.int64))(x), x * rotary.attention_factor, rtol=1e-6)


def test_far_positions_are_exact() -> None:
    position = 1_000_003
    rotation = Rotary(DefaultRotary(base=B), 8).at(torch.tensor([[position]]))
    assert rotation.cos_BT1P.flatten()[0].item() == pytest.approx(math.cos(position), abs=1e-7)
    assert rotation.sin_BT1P.flatten()[0].item() == pytest.approx(math.sin(position), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_comes_back_and_arithmetic_is_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 3, 16).to(dtype)
    rotation = Rotary(SPECS[3], 16).at(torch.arange(9).expand(2, 9))
    assert rotation(x).dtype == dtype
    assert torch.equal(rotation(x), rotation(x.float()).to(dtype))


def test_gradient_and_any_layout() -> None:
    rotation = Rotary(SPECS[3], 8).at(torch.arange(5).expand(2, 5))
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    dout = torch.randn(2, 5, 3, 8)
    (gradient,) = torch.autograd.grad(rotation(x), x, dout)
    # A linear map: <rotation(y), dout> = <y, gradient> for every y.
    y = torch.randn(2, 5, 3, 8)
    assert (rotation(y) * dout).sum().item() == pytest.approx((y * gradient).sum().item(), abs=1e-4)
    strided = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(rotation(strided), rotation(x.detach()))


def test_two_specs_share_nothing() -> None:
    positions, x = torch.arange(20)[None], torch.randn(1, 20, 2, 32)
    rotations = [Rotary(spec, 32).at(positions)(x) for spec in SPECS]
    for i, a in enumerate(rotations):
        for b in rotations[:i]:
            assert not torch.allclose(a, b, atol=1e-3)


# Refusals


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "yarn", "base": B, "factor": 4, "original_length": 128, "beta_fast": 1, "beta_slow": 32}, "swapped"),
        (
            {
                "kind": "llama3",
                "base": B,
                "factor": 4,
                "original_length": 128,
                "low_frequency_factor": 4,
                "high_frequency_factor": 1,
            },
            "swapped",
        ),
        ({"kind": "linear", "base": B, "factor": 0.5}, "greater than or equal to 1"),
        ({"kind": "default"}, "Field required"),
        ({"kind": "abf", "base": 1}, "greater than 1"),
        ({"kind": "none", "base": B}, "Extra inputs"),
        ({"kind": "yarm", "base": B}, "yarm"),
    ],
)
def test_specs_refuse_what_cannot_be(table: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(RotarySpec).validate_python(table)


def test_odd_channels_are_refused() -> None:
    with pytest.raises(Refusal, match="channels=7 must be even; try 8"):
        frequencies(DefaultRotary(base=B), 7)
    with pytest.raises(Refusal, match="at least 4 channels"):
        frequencies(NtkRotary(base=B, factor=2), 2)
