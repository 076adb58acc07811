"""Each kind of layer has its own rotation, on every way through the model."""

import pytest
import torch

from attention.attention import Attention
from context.rotary import DefaultRotary, NoRotary, RotaryMap, YarnRotary
from context.rotation import Rotation
from model.generate import generate
from model.prefill import new_cache, read
from parallel.recompute import KINDS, recompute_layers

PLAIN = DefaultRotary(base=10_000.0)
YARN = YarnRotary(base=10_000.0, factor=4, original_length=8)
OLMO_3 = RotaryMap(full=YARN, window=PLAIN)
"""Full layers are scaled, window layers keep what they were trained with."""
PATTERN = {
    "pattern": ["window", "window", "window", "full"],
    "attention": {"num_heads": 4, "num_kv_heads": 2, "window": 5},
}
TOKENS = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int | None, Rotation]]:
    """(a layer's window, what it was turned by) of every call of attention."""
    calls, plain = [], Attention.forward

    def watched(self, x_BTD, rotation, *rest, **named):
        calls.append((self.window, rotation))
        return plain(self, x_BTD, rotation, *rest, **named)

    monkeypatch.setattr(Attention, "forward", watched)
    return calls


def test_window_layers_keep_their_rotation_where_full_ones_are_scaled(tiny_model, seen) -> None:
    model = tiny_model(**PATTERN)
    model.use_rotary(OLMO_3)
    model(TOKENS)
    assert [window for window, _ in seen] == [5, 5, 5, None]
    windows, full = {id(rotation) for _, rotation in seen[:3]}, seen[3][1]
    assert len(windows) == 1 and id(full) not in windows, "one table for each distinct rotation"
    positions, x = torch.arange(24).expand(2, 24), torch.randn(2, 24, 4, 8)
    for rotation, spec in ((seen[0][1], PLAIN), (full, YARN)):
        model.use_rotary(spec)
        assert torch.equal(rotation(x), model.rotary.at(positions)["full"](x))


def test_a_window_layers_rotation_is_not_seen_by_a_full_layer_and_the_other_way(tiny_model) -> None:
    for pattern, changes_nothing, changes_all in (
        (["window"], RotaryMap(full=YARN, window=PLAIN), RotaryMap(full=PLAIN, window=YARN)),
        (["full"], RotaryMap(full=PLAIN, window=YARN), RotaryMap(full=YARN, window=PLAIN)),
        (["window", "full_nope"], RotaryMap(full=YARN, window=PLAIN), RotaryMap(full=PLAIN, window=NoRotary())),
    ):
        window = {"window": 5} if "window" in pattern else {}
        model = tiny_model(pattern=pattern, attention={"num_heads": 4, "num_kv_heads": 2, **window})
        plain = model(TOKENS)[0]
        model.use_rotary(changes_nothing)
        assert torch.equal(model(TOKENS)[0], plain)
        model.use_rotary(changes_all)
        assert not torch.allclose(model(TOKENS)[0], plain, atol=1e-3)


def test_equal_specs_are_one_rotation(tiny_model, seen) -> None:
    model = tiny_model(**PATTERN)
    model.use_rotary(RotaryMap(full=YARN, window=YARN))
    mapped = model(TOKENS)[0]
    assert len({id(rotation) for _, rotation in seen}) == 1
    model.use_rotary(YARN)
    assert torch.equal(model(TOKENS)[0], mapped)


def test_gradients_are_the_same_when_layers_are_computed_again(tiny_model) -> None:
    model = tiny_model(**PATTERN)
    model.use_rotary(OLMO_3)
    gradients = []
    for kind in KINDS:
        recompute_layers(model, kind)
        model.zero_grad()
        model(TOKENS)[0].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for plain, *again in zip(*gradients, strict=True):
        assert all(torch.equal(plain, each) for each in again)


LATENT = {
    "kind": "latent",
    "num_heads": 4,
    "latent_rank": 8,
    "nope_channels": 4,
    "rope_channels": 4,
    "value_channels": 6,
}


@pytest.mark.parametrize("attention", [PATTERN["attention"], {**LATENT, "window": 5}], ids=["grouped", "latent"])
def test_caches_and_chunks_give_the_same_numbers(tiny_model, attention) -> None:
    model = tiny_model(pattern=PATTERN["pattern"], attention=attention).eval()
    model.use_rotary(OLMO_3)
    with torch.no_grad():
        whole = model(TOKENS)[0]
        cache = new_cache(model, 2, 24, chunk=7)
        parts = torch.cat([hidden for _, hidden in read(model, TOKENS, cache, chunk=7)], dim=1)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


def test_generation_uses_it(tiny_model, seen) -> None:
    model = tiny_model(**PATTERN).eval()
    model.use_rotary(OLMO_3)
    generate(model, TOKENS[:1], 3)
    factors = {window: rotation.attention_factor for window, rotation in seen}
    assert factors[5] == 1.0 and factors[None] > 1.1
