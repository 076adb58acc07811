"""What no architecture holds is refused by name, and an export is whole or not there."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from context.rotary import DefaultRotary, LongRotary, ProportionalRotary, RotaryMap, YarnRotary
from data.integers import IntegersSettings
from data.tokenizer import ByteSettings
from model.huggingface import convert
from model.huggingface.architectures import choose
from model.huggingface.convert import Origin, export, read_folder
from model.huggingface.traits import Decoder
from model.transformer import ModelSettings
from settings import Refusal, validate

GROUPED = {"num_heads": 4, "num_kv_heads": 2}
NORMS = {**GROUPED, "head_norms": True}
MOE = {"num_experts": 6, "experts_per_token": 2, "expert_width": 12}
LATENT = {
    "kind": "latent",
    "num_heads": 4,
    "latent_rank": 8,
    "nope_channels": 4,
    "rope_channels": 4,
    "value_channels": 4,
}
WINDOWS = {"pattern": ["window", "full"]}
DENSE = {"feed_forward_width": 40}
TOP_2 = {"count": 3, "keep": 2}
ONE = {"num_experts": 1, "experts_per_token": 1}
PLAIN = DefaultRotary(base=500.0)
YARN = YarnRotary(base=500.0, factor=4.0, original_length=16)


def settings(**case: object) -> ModelSettings:
    return validate({"num_layers": 3, "width": 32, **case}, ModelSettings, "test")


# Each model and what the refusal says of it.
REFUSED: list[tuple[dict, str]] = [
    ({"attention": {**GROUPED, "softcap": 30.0}, **DENSE}, "without model.attention.softcap=30.0 it would be Llama"),
    ({"attention": {**GROUPED, "scale": 0.5}, **DENSE}, "without model.attention.scale=0.5 it would be Llama"),
    ({"attention": {**GROUPED, "sink": True}, **DENSE}, "without model.attention.sink=true it would be Llama"),
    (
        {"attention": {**GROUPED, "temperature": {"kind": "log", "length": 64}}, **DENSE},
        "without model.attention.temperature={ kind = 'log', ... } it would be Llama",
    ),
    (
        {"attention": NORMS, "norm_epsilon": 1e-5, **DENSE},
        "without model.attention.norm_epsilon=1e-06 (there it is 1e-05) it would be Qwen3ForCausalLM",
    ),
    (
        {"attention": {**LATENT, "norm_epsilon": 1e-5}, **DENSE},
        "without model.attention.norm_epsilon=1e-05 (there it is 1e-06) it would be DeepseekV3",
    ),
    (
        {"attention": {**LATENT, "window": 9}, "pattern": ["window"], **DENSE},
        "without model.pattern=['window'] it would be Deep",
    ),
    (
        {"attention": NORMS, "pattern": ["full_nope"], **DENSE},
        "without model.pattern=['full_nope'] (layers without a rotation) it",
    ),
    ({"attention": GROUPED, "pattern": ["full_nope"], "moe": MOE}, "without model.moe it would be SmolLM3"),
    (
        {"attention": {**GROUPED, "window": 9}, **WINDOWS, "moe": MOE},
        "without model.pattern=['window', 'full'] (windows on some layers) it would be Mixtral",
    ),
    (
        {"attention": {**GROUPED, "window": 9}, **WINDOWS, "moe": MOE},
        "with model.attention.head_norms=true it would be Mellum",
    ),
    (
        {"attention": GROUPED, "moe": {**MOE, "router": {"kind": "sqrt_softplus"}}},
        'without model.moe.router.kind="sqrt_softplus" it',
    ),
    (
        {"attention": GROUPED, "moe": {**MOE, "router": {"kind": "hash"}}},
        'without model.moe.router.kind="hash" it would be',
    ),
    (
        {"attention": GROUPED, "moe": {**MOE, "router": {"kind": "expert_choice", "at_eval": "token_choice"}}},
        'without model.moe.router.kind="expert_choice" it would be Mixtral',
    ),
    (
        {"attention": GROUPED, "moe": {**MOE, "null_experts": {"count": 2}}},
        "without model.moe.null_experts it would be Mixtral",
    ),
    (
        {"attention": GROUPED, "moe": {**MOE, "router": {"scale": 2.0}}},
        "without model.moe.router.scale=2.0 it would be Mixtral",
    ),
    (
        {"attention": GROUPED, "moe": {**MOE, "router": {"scale": 2.0}}},
        'with model.moe.router.kind="sigmoid" it would be Glm4',
    ),
    (
        {"attention": NORMS, "moe": {**MOE, "num_shared_experts": 2}},
        "without model.moe.num_shared_experts=2 (without shared_gate) it would be Qwen3Moe",
    ),
    (
        {"attention": NORMS, "moe": {**MOE, "num_shared_experts": 2, "shared_gate": True}},
        "without model.attention.head_norms=true it would be Qwen2Moe",
    ),
    (
        {"attention": GROUPED, "moe": {**MOE, "balance": [{"kind": "bias"}]}},
        'without model.moe.balance.kind="bias" it would be',
    ),
    (
        {"attention": GROUPED, "moe": MOE, "num_dense_layers": 1, **DENSE},
        "without model.num_dense_layers=1 it would be Mixtral",
    ),
    (
        {"attention": GROUPED, "moe": {**MOE, "router": {"groups": TOP_2}}},
        "without model.moe.router.groups it would be Mixtral",
    ),
    (
        {"attention": GROUPED, "moe": {**MOE, "router": {"kind": "sigmoid", "groups": {**TOP_2, "score": "max"}}}},
        'without model.moe.router.groups.score="max" it would be Glm4Moe',
    ),
    (
        {"attention": GROUPED, "moe": {**MOE, **ONE, "router": {"kind": "sigmoid", "normalize": False}}},
        "without model.moe.num_experts=1 it",
    ),
    (
        {"attention": {**NORMS, "num_heads": 3, "num_kv_heads": 1, "channels": 8, "softcap": 9.0}, **DENSE},
        "softcap=9.0 it would be Qwen3",
    ),
]


@pytest.mark.parametrize(("case", "words"), REFUSED)
def test_what_no_architecture_holds_is_refused_by_its_key(case, words):
    with pytest.raises(Refusal, match=re.escape(words)):
        choose(Decoder(settings(**case), PLAIN))


def test_a_refusal_says_what_would_be_exported_and_the_way_out():
    with pytest.raises(Refusal) as refusal:
        choose(Decoder(settings(attention={**GROUPED, "softcap": 30.0}, **DENSE), PLAIN))
    assert str(refusal.value) == (
        "no architecture of transformers is this model: without model.attention.softcap=30.0 it would be"
        " LlamaForCausalLM. It can be evaluated as it is: python -m evals.harness RUN TASKS"
    )
    windows = settings(attention={**GROUPED, "window": 9}, **WINDOWS, **DENSE)
    with pytest.raises(Refusal, match=r"without a rotary for full and another for window layers it would be SmolLM3"):
        choose(Decoder(windows, RotaryMap(full=YARN, window=PLAIN)))


def test_rotations_that_only_some_architectures_have(
    make_model, assert_transformers_agrees, assert_comes_back, tmp_path
):
    """A rotation for each kind of layer, as OLMo 3 extends its context; a share of channels, as GLM has it."""
    mixed = make_model({"attention": {**NORMS, "window": 9}, **WINDOWS, **DENSE}, RotaryMap(full=YARN, window=PLAIN))
    partial = make_model(
        {"attention": GROUPED, "moe": {**MOE, "router": {"kind": "sigmoid"}}}, DefaultRotary(base=500.0, share=0.5)
    )
    untruncated = YARN.model_copy(update={"truncate": False, "beta_fast": 2.0, "beta_slow": 0.2})
    sharp = make_model({"attention": {**NORMS, "window": 9}, **WINDOWS, "moe": MOE}, untruncated)
    names = {}
    for number, model in enumerate((mixed, partial, sharp)):
        out = tmp_path / str(number)
        names[number] = export_to(model, out)
        assert_transformers_agrees(model, out)
        assert_comes_back(model, out)
        assert read_folder(out).decoder.rotary == model.rotary.spec
    assert names == {0: "MellumForCausalLM", 1: "Glm4MoeForCausalLM", 2: "MellumForCausalLM"}
    with pytest.raises(Refusal, match="without a rotary with a share of channels it would be Llama"):
        choose(Decoder(settings(attention=GROUPED, **DENSE), DefaultRotary(base=500.0, share=0.5)))


@pytest.mark.parametrize(
    "spec",
    [
        ProportionalRotary(base=500.0, pairs=0.5),
        LongRotary(base=500.0, factor=4.0, original_length=16, short=(1.0, 1, 1, 1), long=(1.0, 2, 3, 4), use="long"),
    ],
)
def test_rotations_of_less_known_kinds(spec, make_model, assert_transformers_agrees, tmp_path):
    model = make_model({"attention": GROUPED, **DENSE}, spec)
    export_to(model, tmp_path / "out")
    assert_transformers_agrees(model, tmp_path / "out")


def test_a_rotation_for_one_kind_of_layer_alone_needs_no_map(make_model, tmp_path):
    model = make_model(
        {"attention": {**GROUPED, "window": 9}, "pattern": ["window"], **DENSE}, RotaryMap(full=YARN, window=PLAIN)
    )
    assert export_to(model, tmp_path / "out") == "MistralForCausalLM"
    assert read_folder(tmp_path / "out").decoder.rotary == PLAIN


def test_experts_that_no_layer_has_are_not_there(make_model, assert_transformers_agrees, assert_comes_back, tmp_path):
    model = make_model({"attention": NORMS, "moe": MOE, "num_dense_layers": 3, **DENSE})
    assert export_to(model, tmp_path / "out") == "Qwen3ForCausalLM"
    assert_transformers_agrees(model, tmp_path / "out")
    assert_comes_back(model, tmp_path / "out")


def test_latent_attention_with_yarn_by_rotations_is_refused(make_model, tmp_path):
    model = make_model({"attention": LATENT, **DENSE}, YARN.model_copy(update={"ramp": "rotations"}))
    with pytest.raises(Refusal, match="no words for latent attention"):
        export_to(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def export_to(model, out, dtype="float32", **options):
    origin = Origin(48, ByteSettings(), 256)
    return export(Decoder(model.settings, model.rotary.spec), model.state_dict(), origin, out, dtype, **options)


@pytest.fixture
def model(make_model):
    return make_model({"attention": GROUPED, "moe": MOE})


def test_several_files_with_an_index(model, assert_transformers_agrees, assert_comes_back, tmp_path):
    out = tmp_path / "out"
    export_to(model, out, most=20_000)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert (
        files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)] and len(files) > 5
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    for name in files:
        tensors = load_file(out / name).values()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= 20_000
    assert_transformers_agrees(model, out)
    assert_comes_back(model, out)


def test_half_precision_is_rounded_and_said(model, tmp_path):
    export_to(model, tmp_path / "out", "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in read_folder(tmp_path / "out").weights.items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16().float())


def test_weights_that_half_precision_does_not_hold_are_refused(model, tmp_path):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["embedding.weight"][3, 4] = -70_000.0
    decoder, origin = Decoder(model.settings, model.rotary.spec), Origin(48, ByteSettings(), 256)
    with pytest.raises(
        Refusal, match=r"--dtype float16: model.embed_tokens.weight has a number of 7e\+04, .* 6.55e\+04"
    ):
        export(decoder, weights, origin, tmp_path / "out", "float16")
    assert not any(tmp_path.iterdir())


def test_an_empty_folder_may_be_named_by_a_dot(model, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export_to(model, Path())
    assert (tmp_path / "out" / "model.safetensors").is_file()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(Refusal, match="out: is already there"):
        export_to(model, Path())


def test_an_export_that_breaks_off_leaves_nothing(model, tmp_path, monkeypatch):
    def breaks(folder, *_):
        (folder / "shard-0").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_weights", breaks)
    with pytest.raises(OSError, match="No space"):
        export_to(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_what_reads_no_text_is_refused_before_weights_are_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "write_weights", None)
    origin = Origin(48, IntegersSettings(size=257), 256)
    with pytest.raises(Refusal, match=r'kind="integers" reads no text, .*: python -m evals RUN'):
        export(Decoder(model.settings, model.rotary.spec), model.state_dict(), origin, tmp_path / "out", "float32")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_written_over(model, tmp_path):
    (tmp_path / "out").mkdir()
    export_to(model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(Refusal, match="out: is already there; remove it"):
        export_to(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="file: is already there"):
        export_to(model, tmp_path / "file")


def test_experts_are_views_and_not_copies(model):
    """A mixture is mostly experts: to hold them twice would double what an export needs."""
    from model.huggingface.architectures import BY_NAME
    from model.huggingface.tensors import layout_of

    weights = model.state_dict()
    stacked = weights["blocks.0.feed_forward.experts.gate_up"]
    named = dict(layout_of(BY_NAME["MixtralForCausalLM"], model.settings).export(weights))
    piece = named["model.layers.0.block_sparse_moe.experts.3.w3.weight"]
    assert piece.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
    assert torch.equal(piece, stacked[3, 12:])
