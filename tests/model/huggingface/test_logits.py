"""What is exported computes the same in transformers, and comes back as it was: every architecture, every rotation."""

import json

import pytest

from context.rotary import AnyRotary
from data.tokenizer import ByteSettings
from model.huggingface.architectures import ARCHITECTURES, choose
from model.huggingface.convert import Origin, export, read_folder
from model.huggingface.traits import Decoder
from settings import Section, validate

pytest.importorskip("transformers")

GROUPED = {"num_heads": 4, "num_kv_heads": 2}
NORMS = {**GROUPED, "head_norms": True}
WINDOW = {"window": 9}
MOE = {"num_experts": 6, "experts_per_token": 2, "expert_width": 12}
ALONE = {"kind": "sigmoid", "scale": 2.5}
LATENT = {
    "kind": "latent",
    "num_heads": 4,
    "latent_rank": 12,
    "nope_channels": 6,
    "rope_channels": 8,
    "value_channels": 5,
}
DENSE_FIRST = {"num_dense_layers": 1, "feed_forward_width": 40}
FEED_FORWARD = {"feed_forward_width": 40}
GROUPS = {"count": 3, "keep": 2}
BIAS = [{"kind": "bias"}]
SHARED = {"num_shared_experts": 2}

# What each architecture has to hold: at least two models, plain and with all that it may have.
CASES: dict[str, list[dict]] = {
    "LlamaForCausalLM": [
        {"attention": GROUPED, **FEED_FORWARD},
        {"attention": {**GROUPED, "channels": 6}, **FEED_FORWARD, "tied_embeddings": True, "norm_epsilon": 1e-3},
    ],
    "MistralForCausalLM": [
        {"attention": {**GROUPED, **WINDOW}, "pattern": ["window"], **FEED_FORWARD},
        {"attention": {"num_heads": 3, "num_kv_heads": 1, "channels": 8}, **FEED_FORWARD, "tied_embeddings": True},
    ],
    "Qwen3ForCausalLM": [
        {"attention": NORMS, **FEED_FORWARD},
        {"attention": {**NORMS, **WINDOW}, "pattern": ["window", "full"], **FEED_FORWARD, "tied_embeddings": True},
        {"attention": {**NORMS, **WINDOW, "channels": 10}, "pattern": ["window"], **FEED_FORWARD},
        {"attention": NORMS, **FEED_FORWARD, "norm_epsilon": 1e-2},
    ],
    "SmolLM3ForCausalLM": [
        {"attention": GROUPED, "pattern": ["full", "full_nope"], **FEED_FORWARD},
        {"attention": GROUPED, "pattern": ["full_nope"], **FEED_FORWARD, "tied_embeddings": True},
        {"attention": {**GROUPED, **WINDOW}, "pattern": ["window", "full_nope", "window_nope"], **FEED_FORWARD},
    ],
    "MixtralForCausalLM": [
        {"attention": GROUPED, "moe": MOE},
        {"attention": {**GROUPED, **WINDOW}, "pattern": ["window"], "moe": MOE, "tied_embeddings": True},
    ],
    "Qwen3MoeForCausalLM": [
        {"attention": NORMS, "moe": MOE},
        {
            "attention": {**NORMS, **WINDOW, "channels": 10},
            "pattern": ["window"],
            "moe": {**MOE, "router": {"normalize": False}},
            **DENSE_FIRST,
        },
    ],
    "MellumForCausalLM": [
        {"attention": {**NORMS, **WINDOW}, "pattern": ["window", "full"], "moe": MOE},
        {
            "attention": {**NORMS, **WINDOW},
            "pattern": ["window", "window", "full"],
            "moe": {**MOE, "router": {"normalize": False}},
            **DENSE_FIRST,
            "tied_embeddings": True,
        },
    ],
    "Qwen2MoeForCausalLM": [
        {"attention": GROUPED, "moe": {**MOE, **SHARED, "shared_gate": True}},
        {
            "attention": {**GROUPED, **WINDOW},
            "pattern": ["window", "full"],
            "moe": {**MOE, **SHARED, "shared_gate": True, "router": {"normalize": False}},
            **DENSE_FIRST,
        },
    ],
    "Glm4MoeForCausalLM": [
        {"attention": GROUPED, "moe": {**MOE, "router": {"kind": "sigmoid"}}},
        {"attention": NORMS, "moe": {**MOE, **SHARED, "router": {**ALONE, "groups": GROUPS}, "balance": BIAS}},
        {"attention": NORMS, "moe": {**MOE, "router": {**ALONE, "normalize": False}, "balance": BIAS}, **DENSE_FIRST},
    ],
    "Dots1ForCausalLM": [
        {"attention": {**NORMS, **WINDOW}, "pattern": ["window", "full"], "moe": {**MOE, "router": ALONE}},
        {
            "attention": {**NORMS, **WINDOW},
            "pattern": ["window"],
            "moe": {**MOE, **SHARED, "router": {**ALONE, "groups": GROUPS}, "balance": BIAS},
            **DENSE_FIRST,
        },
    ],
    "DeepseekV3ForCausalLM": [
        {"attention": LATENT, **FEED_FORWARD},
        {"attention": {**LATENT, "query_rank": 10}, "moe": {**MOE, "router": ALONE}, "norm_epsilon": 1e-3},
        {
            "attention": {**LATENT, "query_rank": 10},
            "moe": {**MOE, **SHARED, "router": {**ALONE, "groups": GROUPS}, "balance": BIAS},
            **DENSE_FIRST,
        },
    ],
}  # fmt: skip
ALL = [(name, case) for name, cases in CASES.items() for case in cases]
ROTARIES = {
    "default": {"kind": "default", "base": 500.0},
    "abf": {"kind": "abf", "base": 5e4},
    "linear": {"kind": "linear", "base": 500.0, "factor": 4.0},
    "ntk": {"kind": "ntk", "base": 500.0, "factor": 4.0},
    "dynamic": {"kind": "dynamic", "base": 500.0, "factor": 4.0, "original_length": 16, "length": 48},
    "yarn": {"kind": "yarn", "base": 500.0, "factor": 4.0, "original_length": 12, "beta_fast": 2.0, "beta_slow": 0.2},
    "yarn by rotations": {
        "kind": "yarn", "base": 500.0, "factor": 4.0, "original_length": 12, "ramp": "rotations", "beta_fast": 2.0,
        "beta_slow": 0.2,
    },
    "yarn as gpt-oss": {
        "kind": "yarn", "base": 500.0, "factor": 4.0, "original_length": 12, "truncate": False, "attention_factor": 1.2,
        "beta_fast": 2.0, "beta_slow": 0.2,
    },
    "llama3": {"kind": "llama3", "base": 500.0, "factor": 4.0, "original_length": 24},
    "none": {"kind": "none"},
}  # fmt: skip


class Read(Section):
    rotary: AnyRotary


def rotary(name: str) -> AnyRotary:
    return validate({"rotary": ROTARIES[name]}, Read, "test").rotary


def decoder(model) -> Decoder:
    return Decoder(model.settings, model.rotary.spec)


def write(model, out):
    export(decoder(model), model.state_dict(), Origin(48, ByteSettings(), 256), out, "float32")


@pytest.mark.parametrize(("name", "case"), ALL, ids=[f"{name}-{n}" for n, (name, _) in enumerate(ALL)])
def test_every_architecture(  # noqa: PLR0917
    name, case, make_model, assert_transformers_agrees, assert_comes_back, tmp_path
):
    model = make_model(case)
    assert choose(decoder(model)).name == name
    write(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [name]
    assert_transformers_agrees(model, tmp_path / "out")
    assert_comes_back(model, tmp_path / "out")


def test_every_row_of_the_table_has_a_case():
    assert list(CASES) == [architecture.name for architecture in ARCHITECTURES]


@pytest.mark.parametrize("kind", ROTARIES)
@pytest.mark.parametrize("name", CASES)
def test_every_rotation(  # noqa: PLR0917
    name, kind, make_model, logits, assert_transformers_agrees, tmp_path
):
    if name.startswith("Deepseek") and kind == "yarn by rotations":
        pytest.skip("has no words for it: tests/model/huggingface/test_export.py")
    model = make_model(CASES[name][-1], rotary(kind))
    write(model, tmp_path / "out")
    assert_transformers_agrees(model, tmp_path / "out")
    imported = read_folder(tmp_path / "out")
    before = logits(model)
    model.use_rotary(imported.decoder.rotary)
    # Bit for bit where the kind has a name there; the others are written as equal frequencies.
    assert (logits(model) - before).abs().max() <= 2e-5
