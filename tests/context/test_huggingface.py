"""Rotary position in and out of Hugging Face: transformers' own functions say what a configuration means."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from context import rotary as kinds
from context.frequencies import frequencies
from context.huggingface import from_huggingface, to_huggingface
from settings import Refusal

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
glm = pytest.importorskip("transformers.models.glm.modeling_glm")

LAYERS = ["full_attention", "sliding_attention"]


class Fp64Torch:
    """torch, but for one thing: what is asked for in fp32 is made in fp64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_fp64() -> Iterator[None]:
    """Their formulae without their rounding, which is above 1e-6 for steep ramps."""
    rope_utils.torch, glm.torch = Fp64Torch(), Fp64Torch()
    try:
        yield
    finally:
        rope_utils.torch = glm.torch = torch


def theirs(
    keys: dict[str, Any], channels: int, length: int | None = None, layer: str | None = None
) -> tuple[torch.Tensor, float]:
    """What transformers computes of a configuration for texts of `length` tokens."""
    keys = json.loads(json.dumps(keys))
    config = transformers.LlamaConfig(
        hidden_size=channels,
        num_attention_heads=1,
        head_dim=channels,
        **({} if layer is None else {"layer_types": LAYERS, "num_hidden_layers": 2}),
        **keys,
    )
    parameters = config.rope_parameters if layer is None else config.rope_parameters[layer]
    with in_fp64():
        if parameters["rope_type"] == "default":
            config.rope_parameters = parameters
            return glm.GlmRotaryEmbedding.compute_default_rope_parameters(config)
        return rope_utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length, layer_type=layer)


def assert_equal(ours: tuple[torch.Tensor, float], wanted: tuple[torch.Tensor, float]) -> None:
    assert ours[0].shape == wanted[0].shape
    assert torch.allclose(ours[0].double(), wanted[0].double(), rtol=1e-6, atol=0)
    assert ours[1] == pytest.approx(wanted[1], rel=1e-9)


# Their configurations, randomly drawn

channel_numbers = st.sampled_from([16, 32, 64, 128])
lengths = st.integers(16, 16384)
factors = st.floats(1, 64) | st.integers(1, 64)
shares = st.sampled_from([0.25, 0.5, 0.75, 1.0])
maybe = st.none


@st.composite
def parameters(draw: st.DrawFn, channels: int) -> dict[str, Any]:
    """One table of rope_parameters of any type they have, with any of its optional keys."""
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"]))
    table: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.floats(100, 1e7) | st.integers(100, 10**7))}
    if kind != "default":
        table["factor"] = draw(factors)
    if draw(st.booleans()):
        table["partial_rotary_factor"] = draw(shares)
    if kind in {"yarn", "longrope", "llama3"}:
        table["original_max_position_embeddings"] = draw(lengths)
    optional: dict[str, Any] = {}
    if kind == "yarn":
        optional = {
            "beta_fast": draw(maybe() | st.floats(4, 64)),
            "beta_slow": draw(maybe() | st.floats(0.25, 2)),
            "attention_factor": draw(maybe() | st.floats(0.5, 2)),
            "mscale": draw(maybe() | st.just(0) | st.floats(0.1, 2)),
            "mscale_all_dim": draw(maybe() | st.just(0) | st.floats(0.1, 2)),
            "truncate": draw(maybe() | st.booleans()),
        }
    elif kind == "longrope":
        pairs = int(channels * table.get("partial_rotary_factor", 1.0)) // 2
        lists = st.lists(st.floats(0.5, 64), min_size=pairs, max_size=pairs)
        optional = {"attention_factor": draw(maybe() | st.floats(0.5, 2))}
        table |= {"short_factor": draw(lists), "long_factor": draw(lists)}
        if draw(st.booleans()):
            table["factor"] = None
    elif kind == "llama3":
        table |= {"low_freq_factor": draw(st.floats(0.5, 1.5)), "high_freq_factor": draw(st.floats(2, 8))}
    return table | {key: value for key, value in optional.items() if value is not None}


@st.composite
def configurations(draw: st.DrawFn) -> tuple[dict[str, Any], int, int]:
    """(config.json's part, channels of a head, length of a text)."""
    channels = draw(channel_numbers)
    table = draw(parameters(channels))
    return {"rope_parameters": table, "max_position_embeddings": draw(lengths)}, channels, draw(lengths)


@settings(max_examples=300, deadline=None)
@given(configurations())
def test_reads_what_transformers_computes(drawn: tuple[dict[str, Any], int, int]) -> None:
    config, channels, length = drawn
    spec = from_huggingface(config, length)
    assert_equal(frequencies(spec, channels), theirs(config, channels, length))


@settings(max_examples=100, deadline=None)
@given(configurations(), st.sampled_from(["type", "rope_type"]))
def test_reads_version_4(drawn: tuple[dict[str, Any], int, int], key: str) -> None:
    config, _, length = drawn
    table = dict(config["rope_parameters"])
    old = {"rope_theta": table.pop("rope_theta"), "max_position_embeddings": config["max_position_embeddings"]}
    share = table.pop("partial_rotary_factor", None)
    if share is not None:
        old["partial_rotary_factor"] = share
    kind = table.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {key: kind, **table}
    if kind != "proportional" or share is not None:
        assert from_huggingface(old, length) == from_huggingface(config, length)


# Our rotations, randomly drawn

bases = st.floats(100, 1e7)
stretch = st.floats(1, 64)
some_share = st.sampled_from([None, 0.5, 0.75])


@st.composite
def rotations(draw: st.DrawFn, channels: int) -> kinds.RotarySpec:
    share = draw(some_share)
    pairs = int(channels * (share or 1.0)) // 2
    factor_lists = st.lists(st.floats(0.5, 64), min_size=pairs, max_size=pairs)
    original: Any = {"base": draw(bases), "factor": draw(stretch), "original_length": draw(lengths), "share": share}
    plain: Any = {key: original[key] for key in ("base", "share")}
    stretched: Any = plain | {"factor": original["factor"]}
    ramp = draw(st.sampled_from(["index", "rotations"]))
    mscale = draw(maybe() | st.floats(0.1, 2))
    attention_factor = draw(maybe() | st.floats(0.5, 2))
    make = {
        "default": lambda: kinds.DefaultRotary(**plain),
        "abf": lambda: kinds.AbfRotary(**plain),
        "linear": lambda: kinds.LinearRotary(**stretched),
        "ntk": lambda: kinds.NtkRotary(**stretched),
        "dynamic": lambda: kinds.DynamicRotary(**original, length=draw(lengths)),
        "yarn": lambda: kinds.YarnRotary(
            **original,
            ramp=ramp,
            truncate=ramp == "rotations" or draw(st.booleans()),
            mscale=mscale,
            mscale_all_dim=mscale and 1.0,
            attention_factor=attention_factor if mscale is None else None,
        ),
        "llama3": lambda: kinds.Llama3Rotary(**original),
        "longrope": lambda: kinds.LongRotary(
            **original,
            short=tuple(draw(factor_lists)),
            long=tuple(draw(factor_lists)),
            use=draw(st.sampled_from(["short", "long"])),
            attention_factor=attention_factor,
        ),
        "proportional": lambda: kinds.ProportionalRotary(
            base=original["base"], factor=original["factor"], pairs=draw(st.floats(0.01, 1))
        ),
        "none": kinds.NoRotary,
    }
    return make[draw(st.sampled_from(sorted(make)))]()


@st.composite
def placed_rotations(draw: st.DrawFn) -> tuple[kinds.RotarySpec, kinds.RotarySpec, int, int]:
    channels = draw(channel_numbers)
    return draw(rotations(channels)), draw(rotations(channels)), channels, draw(lengths)


@settings(max_examples=300, deadline=None)
@given(placed_rotations())
def test_writes_what_we_compute_at_every_length(
    drawn: tuple[kinds.RotarySpec, kinds.RotarySpec, int, int],
) -> None:
    spec, _, channels, length = drawn
    wanted = frequencies(spec, channels)
    config = to_huggingface(spec, channels) | {"max_position_embeddings": 4096}
    assert_equal(wanted, theirs(config, channels, length))
    again = from_huggingface(config, length)
    assert_equal(frequencies(again, channels), wanted)
    if spec.kind not in {"none", "proportional"}:
        old = to_huggingface(spec, channels, version=4) | {"max_position_embeddings": 4096}
        assert from_huggingface(old, length) == again
        assert_equal(wanted, theirs(old, channels, length))


@settings(max_examples=150, deadline=None)
@given(placed_rotations())
def test_a_map_is_nested_by_layer_type(drawn: tuple[kinds.RotarySpec, kinds.RotarySpec, int, int]) -> None:
    full, window, channels, length = drawn
    both = kinds.RotaryMap(full=full, window=window)
    try:
        config = to_huggingface(both, channels) | {"max_position_embeddings": 4096}
    except Refusal as refusal:
        assert "truncate" in str(refusal) and full.truncate != window.truncate
        return
    again = kinds.by_view(from_huggingface(config, length))
    if full != window:
        for spec, view, layer in ((full, "full", LAYERS[0]), (window, "window", LAYERS[1])):
            assert_equal(frequencies(spec, channels), theirs(config, channels, length, layer))
            assert_equal(frequencies(again[view], channels), frequencies(spec, channels))


# Files as they are published


def test_latent_attention_has_the_factor_on_all_of_a_score() -> None:
    """DeepSeek-V3's own table: cos and sin are not scaled there, scores are; ours has one factor for both."""
    table = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    config = {"rope_theta": 10000, "rope_scaling": table, "max_position_embeddings": 163840, "kv_lora_rank": 512}
    spec = kinds.YarnRotary(base=10000, factor=40, original_length=4096)
    assert from_huggingface(config) == spec
    lite = from_huggingface(config | {"rope_scaling": table | {"mscale": 0.707, "mscale_all_dim": 0.707}})
    assert lite == spec.model_copy(update={"attention_factor": 0.0707 * math.log(40) + 1})
    for each in (spec, lite, spec.model_copy(update={"attention_factor": 1.0})):
        written = to_huggingface(each, 64, is_latent=True)
        assert frequencies(from_huggingface(written | {"kv_lora_rank": 1}), 64)[1] == pytest.approx(
            frequencies(each, 64)[1], rel=1e-12
        )
        assert theirs(written | {"max_position_embeddings": 163840}, 64)[1] == 1.0
    with pytest.raises(Refusal, match="scales the rotated part of latent attention"):
        from_huggingface(config | {"rope_scaling": table | {"mscale": 0.5}})
    with pytest.raises(Refusal, match="no words for latent attention"):
        to_huggingface(spec.model_copy(update={"ramp": "rotations"}), 64, is_latent=True)


def test_olmo_3_and_gemma_3_scale_full_layers_only() -> None:
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
    olmo = {"model_type": "olmo3", "rope_theta": 500000, "rope_scaling": yarn, "max_position_embeddings": 65536}
    full = kinds.YarnRotary(base=5e5, factor=8, original_length=8192)
    assert from_huggingface(olmo) == kinds.RotaryMap(full=full, window=kinds.DefaultRotary(base=5e5))
    there = transformers.Olmo3Config(**{key: value for key, value in olmo.items() if key != "model_type"})
    assert from_huggingface(there.to_dict()) == from_huggingface(olmo)
    gemma = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    wanted = kinds.RotaryMap(full=kinds.LinearRotary(base=1e6, factor=8), window=kinds.DefaultRotary(base=1e4))
    assert from_huggingface(gemma | {"model_type": "gemma3_text"}) == wanted
    assert from_huggingface(transformers.Gemma3TextConfig(**gemma).to_dict()) == wanted


def test_truncate_is_read_beside_the_layer_types() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}
    nested = {"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = {"rope_parameters": nested, "max_position_embeddings": 16384}
    assert kinds.by_view(from_huggingface(config))["full"].truncate
    beside = config | {"rope_parameters": nested | {"truncate": False}}
    assert not kinds.by_view(from_huggingface(beside))["full"].truncate
    for config_too in (config, beside):
        ours = frequencies(kinds.by_view(from_huggingface(config_too))["full"], 64)
        assert_equal(ours, theirs(config_too, 64, layer="full_attention"))
    inside = config | {"rope_parameters": nested | {"full_attention": yarn | {"truncate": False}}}
    with pytest.raises(Refusal, match=r"full_attention.truncate=False: transformers passes it over"):
        from_huggingface(inside)


def test_a_layer_type_without_a_table_is_not_turned() -> None:
    nested = {"full_attention": None, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    wanted = kinds.RotaryMap(full=kinds.NoRotary(), window=kinds.DefaultRotary(base=1e4))
    assert from_huggingface({"rope_parameters": nested}) == wanted
    alone = {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}
    assert from_huggingface(alone) == kinds.DefaultRotary(base=1e4)


def test_lengths_come_from_the_configuration_or_the_caller() -> None:
    lists = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    phi = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, **lists}
    config = {"rope_parameters": phi, "max_position_embeddings": 131072}
    assert (from_huggingface(config).use, from_huggingface(config).factor) == ("long", 32)
    assert from_huggingface(config, 4096).use == "short" and from_huggingface(config, 4097).use == "long"
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    assert from_huggingface(dynamic | {"max_position_embeddings": 2048}).length == 2048
    spec = from_huggingface(dynamic | {"max_position_embeddings": 2048}, 8192)
    assert (spec.original_length, spec.length) == (2048, 8192)
    # What stands outside wins, as transformers has it for Phi-3; within layer types it is not looked at.
    outside = config | {"original_max_position_embeddings": 8192}
    assert from_huggingface(outside).original_length == 8192
    nested = outside | {"rope_parameters": {"full_attention": phi}}
    assert from_huggingface(nested).original_length == 4096


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "rope_theta is missing"),
        (
            {"rope_parameters": {"rope_type": "yarm", "rope_theta": 1e4}},
            "unknown rope_type 'yarm'; did you mean 'yarn'",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}}, "mrope_section: rope_type 'default' has no"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, "rope_scaling: rotary.factor: is missing"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4}}, "so is max_position_embeddings"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 4}}, "needs max_position_embeddings"),
        (
            {
                "rope_theta": 1e4,
                "max_position_embeddings": 9,
                "rope_scaling": {"type": "dynamic", "factor": 4, "original_max_position_embeddings": 4},
            },
            "original_max_position_embeddings: rope_type 'dynamic' has no such key",
        ),
        ({"rope_parameters": {"full_attention": {}, "chunked_attention": {}}}, "chunked_attention: unknown layer type"),
        ({"rope_parameters": {"full_attention": {}, "rope_theta": 1}}, "rope_theta: unknown key beside layer types"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear"}}, "only one can be right"),
        ({"rope_parameters": 7}, "config.json: rope_parameters=7: "),
        ({"rope_theta": 1e4, "rope_scaling": "yarn"}, 'config.json: rope_scaling="yarn": '),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_parameters.rope_type=\["),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention=3: "),
        ({"rope_parameters": {"rope_theta": "many"}}, 'rope_parameters: rotary.base="many": .* valid number'),
    ],
)
def test_what_is_not_understood_is_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        from_huggingface(config)


def test_what_version_4_has_no_words_for_is_refused() -> None:
    plain = kinds.DefaultRotary(base=1e4)
    for rotary in (kinds.NoRotary(), kinds.ProportionalRotary(base=1e4, pairs=0.5)):
        with pytest.raises(Refusal, match="no name in rope_scaling"):
            to_huggingface(rotary, 32, version=4)
    with pytest.raises(Refusal, match="for each kind of layer has no place"):
        to_huggingface(kinds.RotaryMap(full=plain, window=kinds.NoRotary()), 32, version=4)
    assert to_huggingface(plain, 32, version=4) == {"rope_theta": 1e4, "rope_scaling": None}


def test_layer_types_that_differ_in_truncate_are_refused() -> None:
    rounded = kinds.YarnRotary(base=1e4, factor=4, original_length=4096)
    exact = rounded.model_copy(update={"truncate": False})
    for full, window in ((rounded, exact), (exact, rounded)):
        with pytest.raises(Refusal, match="one `truncate` for all layer types"):
            to_huggingface(kinds.RotaryMap(full=full, window=window), 64)
    slower = exact.model_copy(update={"factor": 8.0})
    assert to_huggingface(kinds.RotaryMap(full=exact, window=slower), 64)["rope_parameters"]["truncate"] is False
