"""What is said to be computed again is what torch's own counter sees more of, for every kind of recomputation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.block import Kind
from model.feed_forward import FeedForward, SwiGLU
from model.repeated import repeated_by_layer, repeated_flops
from model.transformer import ModelSettings
from parallel.recompute import recompute_layers
from tests.model.conftest import tiny_model, tiny_settings

ROWS, LENGTH = 2, 48
GROUPED = {"num_heads": 4, "num_kv_heads": 2, "backend": "reference"}
LATENT = {
    **{"kind": "latent", "num_heads": 4, "backend": "reference", "query_rank": 10},
    **{"latent_rank": 12, "nope_channels": 6, "rope_channels": 4, "value_channels": 5},
}
MOE = {"experts": "loop"}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "latent": {"attention": LATENT},
    "experts": {"moe": MOE},
    "blocked experts": {"moe": {"experts": "blocked"}},
    "experts that multiply up again": {"moe": {"experts": "blocked", "recompute": "up"}},
    "shared experts with a gate": {"moe": {**MOE, "num_shared_experts": 2, "shared_gate": True}},
    "null experts": {"moe": {**MOE, "null_experts": {"count": 3, "output": "copy"}}},
    "a dense layer first": {"moe": MOE, "num_dense_layers": 1},
}


def settings_of(name: str) -> dict[str, Any]:
    return {"attention": GROUPED, "num_layers": 3, **MODELS[name]}


def counted(name: str, kinds: Any) -> int:
    """Operations of a forward and backward pass; attention without documents sees every key."""
    model: Any = tiny_model(**settings_of(name))
    if "null_experts" in settings_of(name).get("moe", {}):
        for block in model.blocks:  # none is chosen, so that every token meets as many experts as is said
            block.feed_forward.router.weight.data[4:] = 0
            block.feed_forward_norm.weight.data.fill_(1.0)
            block.feed_forward.router.log_scores = lambda logits_NE: logits_NE - 1e4 * (torch.arange(7) >= 4)
    recompute_layers(model, kinds)
    tokens_BT = torch.randint(61, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        hidden_BTD, _ = model(tokens_BT)
        hidden_BTD.square().sum().backward()
    return counter.get_total_flops()


def told(settings: ModelSettings, kinds: tuple[Kind, ...], device: str = "cpu") -> float:
    # The reference multiplies the whole score matrix, the masked half included: as if a row were twice as long, less 1.
    return ROWS * LENGTH * repeated_flops(settings, kinds, device, (2 * LENGTH - 1,))


@pytest.mark.parametrize("kinds", [("none",) * 3, ("ops",) * 3, ("full",) * 3, ("ops", "none", "full")])
@pytest.mark.parametrize("name", MODELS)
def test_repeated_operations_equal_torchs_counter(name: str, kinds: tuple[Kind, ...]) -> None:
    settings = tiny_settings(**settings_of(name))
    plain = {**settings_of(name), "moe": {**settings_of(name)["moe"], "recompute": "none"}} if settings.moe else {}
    base = counted_plain(name, plain)
    assert counted(name, kinds) - base == pytest.approx(told(settings, kinds), rel=1e-9, abs=0)


def counted_plain(name: str, changed: dict[str, Any]) -> int:
    """Nothing is done twice, not even inside of experts."""
    if not changed:
        return counted(name, "none")
    MODELS["plain"] = changed
    try:
        return counted("plain", "none")
    finally:
        del MODELS["plain"]


@pytest.mark.parametrize("kind", ["ops", "full"])
def test_on_a_gpu_a_dense_layer_ends_before_its_last_product(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeedForward, "forward", lambda self, x_BTD: self.down(SwiGLU.apply(self.gate_up(x_BTD))))
    settings = tiny_settings(**settings_of("dense"))
    more = counted("dense", kind) - counted("dense", "none")
    assert more == pytest.approx(told(settings, (kind,) * 3, "cuda"), rel=1e-9)
    assert more < told(settings, (kind,) * 3, "cpu")


def test_windows_and_documents_bound_what_attention_does_again() -> None:
    windowed = {"num_heads": 4, "num_kv_heads": 2, "window": 8}
    settings = tiny_settings(attention=windowed, pattern=["window", "full"], num_layers=2)

    def attention(layer: int, lengths: tuple[int, ...], window: int | None = None) -> float:
        ops, full = (repeated_by_layer(settings, layer, kind, "cpu", lengths, window) for kind in ("ops", "full"))
        return full - ops

    channels = 2 * 32
    assert attention(1, (10,)) == 2 * channels * 5.5
    assert attention(1, (10, 10)) == attention(1, (10,)) < attention(1, (20,))
    assert attention(0, (20,)) == attention(1, (20,), 8) < attention(1, (20,))


def test_kinds_are_ordered(tiny_settings: Callable[..., ModelSettings]) -> None:
    for name in MODELS:
        settings = tiny_settings(**settings_of(name))
        none, ops, full = (repeated_flops(settings, (kind,) * 3, "cuda", (64,)) for kind in ("none", "ops", "full"))
        assert none < ops < full
