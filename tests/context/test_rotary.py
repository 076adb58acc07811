"""What can be said of a rotation, and what turning by it does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from context.rotary import (
    AnyRotary,
    DefaultRotary,
    LinearRotary,
    LongRotary,
    NoRotary,
    RotaryMap,
    RotarySpec,
    YarnRotary,
    by_view,
)
from context.rotation import LayerRotary, Rotary
from settings import Refusal, Section, to_dict, validate
from tests.context.rotations import PLAIN, SPECS, B, every_kind

yarn = SPECS["yarn"]


class Stage(Section):
    rotary: AnyRotary


def read(table: dict) -> AnyRotary:
    return validate({"rotary": table}, Stage, "stage").rotary


# Turning


def test_interpolation_is_position_divided_by_the_factor() -> None:
    x, positions = torch.randn(1, 50, 2, 32), torch.arange(0, 200, 4)[None]
    squeezed = Rotary(LinearRotary(base=B, factor=4), 32).at(positions)(x)
    assert torch.allclose(squeezed, Rotary(PLAIN, 32).at(positions // 4)(x), atol=1e-5)


@every_kind
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100_000), st.integers(0, 2000))
def test_scores_depend_on_distance_only(spec: RotarySpec, shift: int, distance: int) -> None:
    generator = torch.Generator().manual_seed(distance)
    q, k = torch.randn(2, 1, 1, 1, 32, generator=generator)
    rotary = Rotary(spec, 32)

    def score(first: int, second: int) -> float:
        return (rotary.at(torch.tensor([[first]]))(q) * rotary.at(torch.tensor([[second]]))(k)).sum().item()

    assert score(shift + distance, shift) == pytest.approx(score(distance, 0), abs=1e-4)


@every_kind
def test_attention_factor_is_on_what_is_turned(spec: RotarySpec) -> None:
    x, positions = torch.randn(2, 7, 3, 32), torch.randint(0, 1000, (2, 7))
    rotation = Rotary(spec, 32).at(positions)
    factors = {"yarn": 0.1 * math.log(4) + 1, "longrope": math.sqrt(1 + math.log(4) / math.log(128))}
    expected = factors.get(spec.kind, 1.0)
    assert rotation.attention_factor == pytest.approx(expected, rel=1e-12)
    if spec.kind == "none":
        assert rotation(x) is x
        return
    assert rotation.cos_BT1P.dtype == torch.float32
    squares = rotation.cos_BT1P.square() + rotation.sin_BT1P.square()
    assert torch.allclose(squares, torch.tensor(expected**2), rtol=1e-6)
    turned = 2 * rotation.cos_BT1P.shape[-1]
    assert torch.allclose(rotation(x)[..., :turned].norm(dim=-1), expected * x[..., :turned].norm(dim=-1), rtol=1e-5)


@every_kind
def test_position_zero_only_scales(spec: RotarySpec) -> None:
    x, rotary = torch.randn(1, 1, 2, 32), Rotary(spec, 32)
    rotated, turned = rotary.at(torch.zeros(1, 1, dtype=torch.int64))(x), 2 * len(rotary.frequencies)
    assert torch.allclose(rotated[..., :turned], x[..., :turned] * rotary.attention_factor, rtol=1e-6)


@every_kind
def test_rotation_equals_transformers(spec: RotarySpec) -> None:
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    x, positions = torch.randn(2, 9, 3, 32), torch.randint(0, 500, (2, 9))
    rotary = Rotary(spec, 32)
    angles = torch.cat([positions[..., None] * rotary.frequencies] * 2, dim=-1)
    cos, sin = angles.cos() * rotary.attention_factor, angles.sin() * rotary.attention_factor
    wanted, _ = neox.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    assert torch.allclose(rotary.at(positions)(x), wanted, atol=1e-4)


def test_a_share_leaves_the_other_channels_alone() -> None:
    x, positions = torch.randn(2, 9, 3, 32), torch.randint(0, 500, (2, 9))
    turned = Rotary(DefaultRotary(base=B, share=0.25), 32).at(positions)(x)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert torch.equal(turned[..., :8], Rotary(PLAIN, 8).at(positions)(x[..., :8]))


def test_far_positions_are_exact() -> None:
    position = 1_000_003
    rotation = Rotary(PLAIN, 8).at(torch.tensor([[position]]))
    assert rotation.cos_BT1P.flatten()[0].item() == pytest.approx(math.cos(position), abs=1e-7)
    assert rotation.sin_BT1P.flatten()[0].item() == pytest.approx(math.sin(position), abs=1e-7)


@pytest.mark.parametrize("name", ["yarn", "yarn_share"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_comes_back_and_arithmetic_is_fp32(dtype: torch.dtype, name: str) -> None:
    x = torch.randn(2, 9, 3, 32).to(dtype)
    rotation = Rotary(SPECS[name], 32).at(torch.arange(9).expand(2, 9))
    assert rotation(x).dtype == dtype
    assert torch.equal(rotation(x), rotation(x.float()).to(dtype))


@pytest.mark.parametrize("name", ["yarn", "yarn_share"])
def test_gradient_and_any_layout(name: str) -> None:
    rotation = Rotary(SPECS[name], 8).at(torch.arange(5).expand(2, 5))
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
    rotations = [Rotary(spec, 32).at(positions)(x) for spec in SPECS.values()]
    for i, a in enumerate(rotations):
        for b in rotations[:i]:
            assert not torch.allclose(a, b, atol=1e-3)


# A rotation for each kind of layer


def test_kinds_of_layer_share_tables_only_where_their_specs_are_equal() -> None:
    positions = torch.arange(20)[None]
    together = LayerRotary(yarn, 32).at(positions)
    assert together["full"] is together["window"]
    again = YarnRotary.model_validate(yarn.model_dump())
    equal = LayerRotary(RotaryMap(full=yarn, window=again), 32).at(positions)
    assert equal["full"] is equal["window"]
    for other in (
        yarn.model_copy(update={"truncate": False}),
        yarn.model_copy(update={"attention_factor": 2.0}),
        PLAIN,
    ):
        apart = LayerRotary(RotaryMap(full=yarn, window=other), 32).at(positions)
        for view, spec in (("full", yarn), ("window", other)):
            assert torch.equal(apart[view].cos_BT1P, Rotary(spec, 32).at(positions).cos_BT1P)
            assert apart[view].attention_factor == Rotary(spec, 32).attention_factor


@every_kind
def test_a_map_is_read_with_or_without_its_kind_and_written_back(spec: RotarySpec) -> None:
    both = RotaryMap(full=spec, window=PLAIN)
    table = to_dict(both)
    assert read(table) == both
    del table["kind"]
    assert read(table) == both and by_view(read(table)) == {"full": spec, "window": PLAIN}
    assert read(to_dict(spec)) == spec and by_view(spec) == {"full": spec, "window": spec}


def test_what_is_wrong_in_a_map_is_named() -> None:
    with pytest.raises(Refusal, match=r"rotary.window: is missing"):
        read({"full": {"kind": "none"}})
    with pytest.raises(Refusal, match=r"rotary.full.kind: unknown kind 'yarm'; did you mean 'yarn'"):
        read({"full": {"kind": "yarm"}, "window": {"kind": "none"}})
    with pytest.raises(Refusal, match=r"rotary: needs a kind; known: abf, by_layer, default"):
        read({"base": 1e4})


# Refusals


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "yarn", "beta_fast": 1, "beta_slow": 32}, "swapped"),
        ({"kind": "yarn", "mscale": 1}, "give both, or neither"),
        ({"kind": "yarn", "mscale": 1, "mscale_all_dim": 1, "attention_factor": 1}, "give one of them"),
        ({"kind": "yarn", "truncate": False, "ramp": "rotations"}, "truncate=false is about the index ramp"),
        ({"kind": "llama3", "low_frequency_factor": 4, "high_frequency_factor": 1}, "swapped"),
        ({"kind": "longrope", "short": [1], "long": [1, 2], "use": "long"}, "short has 1 factors, long 2"),
        ({"kind": "longrope", "short": [1, 0], "long": [1, 2], "use": "long"}, "greater than 0"),
        ({"kind": "longrope", "short": [1], "long": [1]}, "rotary.use: is missing"),
        ({"kind": "dynamic"}, "rotary.length: is missing"),
    ],
)
def test_specs_refuse_what_cannot_be(table: dict, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        read({"base": B, "factor": 4, "original_length": 128, **table})


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "linear", "base": B, "factor": 0.5}, "greater than or equal to 1"),
        ({"kind": "default"}, "base: is missing"),
        ({"kind": "default", "base": B, "share": 0}, "greater than 0"),
        ({"kind": "proportional", "base": B, "pairs": 1.5}, "less than or equal to 1"),
        ({"kind": "abf", "base": 1}, "greater than 1"),
        ({"kind": "none", "base": B}, "unknown key"),
        ({"kind": "yarm", "base": B}, "did you mean 'yarn'"),
    ],
)
def test_specs_refuse_bad_values(table: dict, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        read(table)


def test_specs_cannot_be_changed_and_are_keys() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        yarn.factor = 8
    assert len({*SPECS.values(), *SPECS.values()}) == len(SPECS)
    assert isinstance(SPECS["longrope"], LongRotary) and hash(SPECS["longrope"]) and SPECS["none"] == NoRotary()
