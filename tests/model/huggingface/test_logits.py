"""What is exported computes the same in transformers, and comes back as it was: every architecture, every rotation."""

import json

import pytest

from context.rotary import AnyRotary
from data.tokenizer import ByteSettings
from model.huggingface.architectures import ARCHITECTURES, choose
from model.huggingface.convert import Origin, export, read_folder
from model.huggingface.traits import Decoder
from settings import Section, validate
from tests.model.huggingface.cases import CASES

pytest.importorskip("transformers")

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
