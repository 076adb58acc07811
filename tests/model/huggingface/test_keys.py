"""Whatever stands under a key of a config.json is read, or refused by the key: no other end, whatever the value."""

import copy
import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from context.rotary import AnyRotary, DefaultRotary, LongRotary, RotaryMap, YarnRotary
from data.tokenizer import ByteSettings
from model.huggingface.architectures import decoder_of
from model.huggingface.convert import Origin, export, read_folder
from model.huggingface.files import read_config
from model.huggingface.traits import Decoder
from settings import Refusal
from tests.model.huggingface.cases import CASES

STRANGE = (
    "four", "", None, True, False, -1, 0, 1, 10**9, 2**63, 10**400, 0.5, 1e308, -1e308, float("nan"), float("inf"),
    [], [None], ["four"], [-1], [10**9], [[]], {}, {"a": 1}, {"rope_type": ["yarn"]},
)  # fmt: skip
YARN = YarnRotary(base=500.0, factor=4.0, original_length=16)
LONG = LongRotary(base=500.0, factor=4.0, original_length=16, short=(1.0,) * 3, long=(2.0,) * 3, use="long")
BESIDE = {
    "rope_scaling": None,
    "rope_theta": None,
    "rope_local_base_freq": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "kv_lora_rank": None,
    "quantization_config": None,
    "num_nextn_predict_layers": 0,
}
"""Keys that are read where they stand, and that we never write."""


def spec_of(name: str) -> AnyRotary:
    if name == "MellumForCausalLM":
        return RotaryMap(full=YARN, window=DefaultRotary(base=500.0))
    return LONG if name == "LlamaForCausalLM" else YARN


def write(make_model, name: str, out) -> dict[str, Any]:
    """A folder of the architecture's last case; its config.json."""
    model = make_model(CASES[name][-1] | {"tied_embeddings": False}, spec_of(name))
    export(
        Decoder(model.settings, model.rotary.spec), model.state_dict(), Origin(48, ByteSettings(), 256), out, "float32"
    )
    return json.loads((out / "config.json").read_text())


def places(table: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


def changed(table: dict[str, Any], place: tuple[str, ...], value: object) -> dict[str, Any]:
    other = copy.deepcopy(table)
    inner = other
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return other


@pytest.mark.parametrize(("number", "name"), enumerate(CASES))
def test_any_value_under_any_key_is_read_or_refused(number, name, make_model, tmp_path):
    """Each architecture is given another part of all values: together they are given nearly all."""
    out = tmp_path / "out"
    whole = {**BESIDE, **write(make_model, name, out)}
    outcomes = set()
    for place, value in list(product(places(whole), STRANGE))[number::7]:
        config = changed(whole, place, value)
        (out / "config.json").write_text(json.dumps(config))
        try:
            _, decoder = decoder_of(read_config(out))
            # Weights are read once for all configurations that say the same of them.
            said = (decoder, str([config["vocab_size"], config["num_nextn_predict_layers"]]))
            if said not in outcomes:
                outcomes.add(said)
                read_folder(out)
        except Refusal:
            outcomes.add("refused")
        except Exception as error:
            raise AssertionError((place, value)) from error
    assert "refused" in outcomes and len(outcomes) > 1


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("num_attention_heads", "four", "valid integer"),
        ("rope_parameters", 7, "valid dictionary|an object"),
        ("rope_parameters", "yarn", "valid dictionary|an object"),
        ("max_position_embeddings", 0, "greater than or equal to 1"),
        ("tie_word_embeddings", "no", "valid boolean"),
        ("architectures", "LlamaForCausalLM", "valid array"),
        ("model_type", "mistral", "architectures=.'LlamaForCausalLM'. is 'llama'"),
        ("hidden_act", "gelu", "only hidden_act='silu'"),
    ],
)
def test_a_refusal_names_the_file_and_the_key(key, value, problem, make_model, tmp_path):
    config = write(make_model, "LlamaForCausalLM", tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(Refusal, match=rf"{tmp_path}/out(/|: )config.json: {key}=.*({problem})"):
        read_folder(tmp_path / "out")


def test_layers_that_config_json_does_not_count_are_refused(make_model, tmp_path):
    """Only those that look more than a token ahead may be left behind."""
    config = write(make_model, "DeepseekV3ForCausalLM", tmp_path / "out")
    for layers, ahead in product(range(1, 6), range(3)):
        counts = {"num_hidden_layers": layers, "num_nextn_predict_layers": ahead}
        (tmp_path / "out" / "config.json").write_text(json.dumps(config | counts))
        if layers <= config["num_hidden_layers"] <= layers + ahead:
            assert read_folder(tmp_path / "out").decoder.settings.num_layers == layers
        else:
            with pytest.raises(Refusal, match=rf"have 3 layers, .* num_hidden_layers={layers} and .*={ahead}; mend"):
                read_folder(tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, make_model, tmp_path):
    write(make_model, "LlamaForCausalLM", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 1] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refusal, match=r"model.safetensors: model.layers.1.mlp.up_proj.weight holds .*NaN or infinite"):
        read_folder(tmp_path)
