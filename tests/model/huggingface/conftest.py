"""Models whose every weight shows, and the two promises of an export."""

import pytest
import torch

from context.rotary import AnyRotary, DefaultRotary
from model.huggingface.convert import read_folder
from model.initialize import initialize
from model.transformer import ModelSettings, Transformer, build_model
from settings import validate

VOCAB, LENGTH = 257, 48


def make(case: dict, spec: AnyRotary | None = None, seed: int = 0) -> Transformer:
    """A model whose every weight shows: norms are not 1, biases not 0, and no head is nearly even."""
    table = {"num_layers": 3, "width": 32, "initial_std": 0.15, **case}
    if table["attention"].get("head_norms") and "norm_epsilon" in table:
        table["attention"] = {**table["attention"], "norm_epsilon": table["norm_epsilon"]}
    model = build_model(validate(table, ModelSettings, "test"), VOCAB)
    initialize(model, seed, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            if "bias_E" in name:
                tensor.uniform_(-0.3, 0.3, generator=generator)
    model.use_rotary(spec or DefaultRotary(base=500.0))
    return model


@torch.no_grad()
def logits(model: Transformer, tokens_BT: torch.Tensor) -> torch.Tensor:
    hidden_BTD, _ = model(tokens_BT)
    return hidden_BTD @ model.head_weight.T


def some_tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def assert_transformers_agrees(model: Transformer, out) -> None:
    """The same logits there, from files in which nothing is missing or too much."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    with torch.no_grad():
        expected = theirs.eval()(some_tokens()).logits
    found = logits(model.eval(), some_tokens())
    assert found.std() > 0.3
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, found.abs().max())


def assert_comes_back(model: Transformer, out) -> None:
    """The same weights bit for bit, and settings that compute the same with them bit for bit."""
    imported = read_folder(out)
    ours = model.state_dict()
    assert imported.weights.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(imported.weights[name], tensor), name
    assert imported.decoder.settings.pattern == model.settings.pattern
    again = build_model(imported.decoder.settings, VOCAB)
    initialize(again, 9, "cpu")
    again.load_state_dict(imported.weights)
    again.use_rotary(imported.decoder.rotary)
    assert torch.equal(logits(again.eval(), some_tokens()), logits(model.eval(), some_tokens()))


@pytest.fixture(name="make_model")
def _make_model():
    return make


@pytest.fixture(name="logits")
def _logits():
    return lambda model: logits(model.eval(), some_tokens())


@pytest.fixture(name="assert_transformers_agrees")
def _assert_transformers_agrees():
    return assert_transformers_agrees


@pytest.fixture(name="assert_comes_back")
def _assert_comes_back():
    return assert_comes_back
