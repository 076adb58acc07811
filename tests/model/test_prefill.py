"""A prompt read in chunks: the same hidden states as of the whole, in memory that its length does not square."""

import pytest
import torch

from model.generate import generate
from model.prefill import new_cache, prefill, read
from settings import Refusal

VOCAB_SIZE, T = 61, 37
LATENT = {
    "kind": "latent",
    "num_heads": 4,
    "query_rank": 10,
    "latent_rank": 12,
    "nope_channels": 6,
    "rope_channels": 4,
    "value_channels": 5,
}
MODELS = {
    "full": {"attention": {"num_heads": 4, "num_kv_heads": 2, "head_norms": True}},
    "windows": {"attention": {"num_heads": 4, "num_kv_heads": 1, "window": 5}, "pattern": ["window", "full_nope"]},
    "sinks": {"attention": {"num_heads": 4, "num_kv_heads": 4, "sink": True, "softcap": 5.0, "window": 3}}
    | {"pattern": ["window"]},
    "temperature": {"attention": {"num_heads": 4, "num_kv_heads": 2, "temperature": {"kind": "steps", "length": 8}}},
    "latent": {"attention": LATENT},
    "latent_windows": {"attention": {**LATENT, "window": 6}, "pattern": ["full", "window_nope"]},
    "experts": {"moe": {"num_shared_experts": 1, "router": {"kind": "sigmoid"}}},
    "turns": {"moe": {"router": {"kind": "uniform"}, "balance": []}},
    "capacity": {"moe": {"capacity": {"factor": 0.5}}},
    "expert_choice": {"moe": {"router": {"kind": "expert_choice", "at_eval": "token_choice"}, "balance": []}},
}


def prompt(rows: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 100])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_chunks_equal_the_whole_forward(tiny_model, name: str, chunk: int) -> None:
    model = tiny_model(**MODELS[name]).eval()
    whole_BTD, _ = model(prompt())
    cache = new_cache(model, 2, T, chunk)
    starts, parts = zip(*read(model, prompt(), cache, chunk), strict=True)
    assert starts == tuple(range(0, T, chunk)) and cache.length == T
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTD, rtol=1e-4, atol=2e-5)
    cache.trim(T - 1)
    torch.testing.assert_close(prefill(model, prompt()[:, -1:], cache), whole_BTD[:, -1], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["full", "windows", "latent", "experts"])
@torch.no_grad()
def test_no_tensor_is_larger_than_a_layers_cache(tiny_model, largest_tensor, name: str) -> None:
    model, chunk, length = tiny_model(**MODELS[name]).eval(), 8, 1024
    cache, tokens_BT = new_cache(model, 1, length, chunk), prompt(1, length)
    with largest_tensor() as in_chunks:
        prefill(model, tokens_BT, cache, chunk)
    with largest_tensor() as at_once:
        model(tokens_BT)
    largest_stream = max(stream.numel() for layer in cache.layers for stream in layer.streams)
    assert in_chunks.numel <= largest_stream < at_once.numel / 4


def test_a_window_layer_takes_the_memory_of_its_window(tiny_model) -> None:
    model = tiny_model(**MODELS["windows"])
    short, long = (new_cache(model, 3, length, chunk=4, reach=2) for length in (100, 1000))
    windows = [cache.layer(0).num_bytes for cache in (short, long)]
    full = [cache.layer(1).num_bytes for cache in (short, long)]
    assert windows == [3 * (4 + 2 + 4) * 2 * 8 * 4] * 2
    assert full == [3 * length * 2 * 8 * 4 for length in (100, 1000)]


@pytest.mark.parametrize("name", ["full", "windows", "latent"])
def test_the_cache_is_in_the_precision_of_the_keys(tiny_model, name: str) -> None:
    model = tiny_model(**MODELS[name]).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = new_cache(model, 2, T)
        last_BD = prefill(model, prompt(), cache, chunk=8)
        whole_BTD, _ = model(prompt())
    assert {stream.dtype for layer in cache.layers for stream in layer.streams} == {torch.bfloat16}
    exact_BD = model(prompt())[0][:, -1]
    # As far from fp32 as the whole forward is, which rounds as often.
    assert (last_BD - exact_BD).norm() <= 2 * (whole_BTD[:, -1] - exact_BD).norm()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_generation_from_the_cache_equals_the_sequence_read_again(tiny_model, name: str) -> None:
    model, tokens_BT = tiny_model(**MODELS[name]).eval(), prompt()
    for _ in range(6):
        following = (model(tokens_BT)[0][:, -1] @ model.head_weight.T).argmax(dim=-1, keepdim=True)
        tokens_BT = torch.cat([tokens_BT, following], dim=1)
    assert torch.equal(generate(model, prompt(), 6), tokens_BT[:, -6:])


@pytest.mark.parametrize("name", ["full", "windows", "latent_windows"])
@torch.no_grad()
def test_one_prefill_serves_many_continuations(tiny_model, name: str) -> None:
    """Side by side from a repeated cache, and one after the other from a trimmed one."""
    model, tails = tiny_model(**MODELS[name]).eval(), prompt(6, 5)
    tokens_BT = prompt()
    expected = model(torch.cat([tokens_BT.repeat_interleave(3, dim=0), tails], dim=1))[0][:, T:]
    cache = new_cache(model, 2, T + 5, chunk=4, reach=5)
    prefill(model, tokens_BT, cache, chunk=4)
    beside = torch.cat([hidden for _, hidden in read(model, tails, cache.repeat(3), chunk=2)], dim=1)
    torch.testing.assert_close(beside, expected, rtol=1e-4, atol=2e-5)
    for number in range(3):
        after = torch.cat([hidden for _, hidden in read(model, tails[number::3], cache, chunk=2)], dim=1)
        torch.testing.assert_close(after, expected[number::3], rtol=1e-4, atol=2e-5)
        cache.trim(T)


def test_routers_that_look_at_whole_rows_are_refused(tiny_model) -> None:
    cases = {
        "capacity": r"model.moe.capacity looks at whole rows .* model.eval\(\)",
        "expert_choice": r"model.moe.router.kind='expert_choice' looks at whole rows",
    }
    for name, message in cases.items():
        model = tiny_model(**MODELS[name]).train()
        with pytest.raises(Refusal, match=message):
            prefill(model, prompt(), new_cache(model, 2, T))
    model = tiny_model(moe={"router": {"kind": "expert_choice"}, "balance": []}).eval()
    cache = new_cache(model, 2, T)
    with pytest.raises(Refusal, match="at_eval"):
        prefill(model, prompt(), cache)
    assert cache.length == 0
