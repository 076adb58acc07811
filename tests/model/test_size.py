"""Parameter and operation counts: against built models, published models and torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from context.rotary import DefaultRotary
from model.initialize import initialize
from model.loss import cross_entropy
from model.size import count, flops_per_token, keys_seen, mean_keys, pairs_seen, step_flops
from model.transformer import ModelSettings, build_model
from settings import validate

MIXTRAL_8X7B = {
    "num_layers": 32,
    "width": 4096,
    "attention": {"num_heads": 32, "num_kv_heads": 8},
    "moe": {"num_experts": 8, "experts_per_token": 2, "expert_width": 14336},
}
MIXTRAL_8X22B = {
    "num_layers": 56,
    "width": 6144,
    "attention": {"num_heads": 48, "num_kv_heads": 8},
    "moe": {"num_experts": 8, "experts_per_token": 2, "expert_width": 16384},
}
OLMOE_1B_7B = {
    "num_layers": 16,
    "width": 2048,
    "attention": {"num_heads": 16, "num_kv_heads": 16},
    "moe": {"num_experts": 64, "experts_per_token": 8, "expert_width": 1024},
}
QWEN3_30B_A3B = {
    "num_layers": 48,
    "width": 2048,
    "attention": {"num_heads": 32, "num_kv_heads": 4, "channels": 128, "head_norms": True},
    "moe": {"num_experts": 128, "experts_per_token": 8, "expert_width": 768},
}
LLAMA_3_1_405B = {
    "num_layers": 126,
    "width": 16384,
    "attention": {"num_heads": 128, "num_kv_heads": 8},
    "feed_forward_width": 53248,
}
DEEPSEEK_V3_ATTENTION = {
    "kind": "latent",
    "num_heads": 128,
    "query_rank": 1536,
    "latent_rank": 512,
    "nope_channels": 128,
    "rope_channels": 64,
    "value_channels": 128,
}
DEEPSEEK_V3 = {
    "num_layers": 61,
    "width": 7168,
    "attention": DEEPSEEK_V3_ATTENTION,
    "feed_forward_width": 18432,
    "num_dense_layers": 3,
    "moe": {"num_experts": 256, "experts_per_token": 8, "expert_width": 2048, "num_shared_experts": 1},
}
LATENT = {
    "kind": "latent",
    "num_heads": 4,
    "latent_rank": 12,
    "nope_channels": 6,
    "rope_channels": 2,
    "value_channels": 5,
}
# OLMoE normalises queries and keys over all heads at once: two weights of full width a layer that we do not build.
OLMOE_EXTRA = 16 * 2 * 2048


@pytest.mark.parametrize(
    ("table", "vocab_size", "total", "active", "extra"),
    [
        (MIXTRAL_8X7B, 32_000, 46_702_792_704, 12_879_925_248, 0),
        (MIXTRAL_8X22B, 32_000, 140_620_634_112, 39_152_031_744, 0),
        (OLMOE_1B_7B, 50_304, 6_919_161_856, 1_282_017_280, OLMOE_EXTRA),
        (QWEN3_30B_A3B, 151_936, 30_532_122_624, 3_353_032_704, 0),
        (LLAMA_3_1_405B, 128_256, 405_853_388_800, 405_853_388_800, 0),
        (DEEPSEEK_V3, 129_280, 671_026_404_352, 37_552_282_624, 0),
    ],
    ids=["Mixtral-8x7B", "Mixtral-8x22B", "OLMoE-1B-7B", "Qwen3-30B-A3B", "Llama-3.1-405B", "DeepSeek-V3"],
)
def test_published_models_have_their_published_sizes(
    table: dict, vocab_size: int, total: int, active: int, extra: int
) -> None:
    settings = validate(table, ModelSettings, "published")
    size = count(settings, vocab_size)
    built = build_model(settings, vocab_size)
    assert sum(parameter.numel() for parameter in built.parameters()) + extra == total
    assert (size.total + extra, size.active + extra) == (total, active)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": True},
        {"attention": {"num_heads": 4, "num_kv_heads": 1, "channels": 12, "head_norms": True}},
        {"attention": {"num_heads": 4, "num_kv_heads": 2, "sink": True}},
        {"attention": LATENT},
        {"attention": {**LATENT, "query_rank": 9}, "moe": {}},
        {"moe": {"num_experts": 5, "experts_per_token": 3, "num_shared_experts": 2}},
        {
            "moe": {
                "num_experts": 4,
                "experts_per_token": 1,
                "expert_width": 8,
                "router": {"kind": "softmax", "normalize": False},
            },
            "num_dense_layers": 2,
        },
        {"moe": {"num_shared_experts": 2, "shared_gate": True, "null_experts": {"count": 3}}},
        {"moe": {"null_experts": {"count": 1, "output": "copy"}, "balance": {"kind": "bias"}}, "num_dense_layers": 1},
        {"moe": {"router": {"kind": "expert_choice"}, "num_shared_experts": 1}},
    ],
)
def test_count_is_the_built_models_part_by_part(tiny_settings, changes: dict) -> None:
    settings = tiny_settings(**changes)
    built = {name: parameter.numel() for name, parameter in build_model(settings, 61).named_parameters()}
    size = count(settings, 61)

    def total(*parts: str) -> int:
        return sum(number for name, number in built.items() if any(part in name for part in parts))

    assert size.total == sum(built.values())
    assert size.embedding == total("embedding.", "head.")
    assert size.attention == total(".attention.")
    assert size.experts == total(".experts.")
    assert size.router == total(".router.")
    assert size.feed_forward == total(".feed_forward.") - size.experts - size.router
    if settings.moe is not None:
        assert size.active_experts * settings.moe.num_experts == size.experts * settings.moe.experts_per_token


GROUPED = {"num_heads": 4, "num_kv_heads": 2, "channels": 16, "sink": True}


@pytest.mark.parametrize(
    ("moe", "attention", "score_channels"),
    [
        (None, GROUPED, 16),
        (None, LATENT, 8),
        (None, {**LATENT, "query_rank": 10}, 8),
        ({}, GROUPED, 16),
        (
            {"num_shared_experts": 1, "shared_gate": True, "router": {"kind": "expert_choice"}, "balance": []},
            GROUPED,
            16,
        ),
    ],
)
def test_operations_equal_torchs_counter(tiny_settings, moe: dict | None, attention: dict, score_channels: int) -> None:
    rows, length, vocab_size = 2, 48, 61
    # Written out as plain products: torch's counter sees neither grouped products nor the CPU's attention kernel.
    # It counts the whole score matrix, so the masked half is in both numbers.
    changes = {"attention": {**attention, "backend": "reference"}, "num_layers": 2}
    if moe is not None:
        changes["moe"] = {"experts": "loop", **moe}
    settings = tiny_settings(**changes)
    model = build_model(settings, vocab_size)
    initialize(model, 0, "cpu")
    model.use_rotary(DefaultRotary(base=10_000.0))
    tokens = torch.randint(vocab_size, (rows, length))
    with FlopCounterMode(display=False) as counter:
        hidden, _ = model(tokens)
        cross_entropy(hidden.flatten(0, 1), model.head_weight, tokens.flatten(), None, chunk=32).weighted.backward()
    ours = flops_per_token(settings, vocab_size, length, causal=False) * rows * length
    # Attention's backward pass makes the scores again from queries and keys; nothing recomputed is in our number.
    again = settings.num_layers * rows * length * length * 2 * attention["num_heads"] * score_channels
    assert counter.get_total_flops() == pytest.approx(ours + again, rel=0.01)


SHAPES: dict[str, dict] = {
    "tied": {"tied_embeddings": True},
    "as many keys as queries": {"attention": {"num_heads": 4, "num_kv_heads": 4}},
    "one key for all": {"attention": {"num_heads": 4, "num_kv_heads": 1, "head_norms": True}},
    "wide heads": {"attention": {"num_heads": 2, "num_kv_heads": 1, "channels": 40}},
    "windows": {"attention": {"num_heads": 4, "num_kv_heads": 2, "window": 8}, "pattern": ["window", "full"]},
    "three layers, wide inside": {"num_layers": 3, "feed_forward_width": 200},
    "latent": {"attention": LATENT, "tied_embeddings": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_dense_shape_equals_torchs_counter(tiny_settings, shape: str) -> None:
    """To a rounding: the counter sees whole score matrices in windows too, and the scores that are made again."""
    rows, length, vocab_size = 2, 32, 61
    attention = {"num_heads": 4, "num_kv_heads": 2, **SHAPES[shape].get("attention", {}), "backend": "reference"}
    if attention.get("kind") == "latent":
        attention.pop("num_kv_heads")
    settings = tiny_settings(**{"num_layers": 2, **SHAPES[shape], "attention": attention})
    counted = counted_by_torch(settings, vocab_size, rows, length)
    H = settings.attention.num_heads
    score_channels = 8 if attention.get("kind") == "latent" else attention.get("channels", settings.width // H)
    again = settings.num_layers * rows * length * length * 2 * H * score_channels
    ours = flops_per_token(settings, vocab_size, length, causal=False) * rows * length
    assert counted == pytest.approx(ours + again, rel=1e-9)


def counted_by_torch(settings: ModelSettings, vocab_size: int, rows: int, length: int) -> int:
    """Forward and backward, of random tokens."""
    model = build_model(settings, vocab_size)
    initialize(model, 0, "cpu")
    model.use_rotary(DefaultRotary(base=10_000.0))
    tokens = torch.randint(vocab_size, (rows, length))
    with FlopCounterMode(display=False) as counter:
        hidden, _ = model(tokens)
        cross_entropy(hidden.flatten(0, 1), model.head_weight, tokens.flatten(), None, chunk=32).weighted.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "moe",
    [
        {"num_experts": 5, "experts_per_token": 3, "expert_width": 24},
        {"num_shared_experts": 2, "shared_gate": True},
        {"experts_per_token": 1, "router": {"kind": "softmax", "normalize": False}},
        {"router": {"kind": "hash"}, "balance": []},
    ],
    ids=["three of five", "shared", "one", "hash"],
)
def test_a_mixtures_operations_are_those_counted_by_hand_and_in_its_loop(tiny_settings, moe: dict) -> None:
    """By hand to the last operation; under the counter the experts are a loop of plain products."""
    rows, length, V, D = 2, 32, 61, 32
    table = {"num_experts": 4, "experts_per_token": 2, "expert_width": 16, "experts": "loop", **moe}
    attention = {"num_heads": 4, "num_kv_heads": 2, "backend": "reference"}
    dense = {"num_layers": 2, "num_dense_layers": 1, "feed_forward_width": 80, "width": D}
    settings = tiny_settings(**dense, attention=attention, moe=table)
    E, K, F = (table[key] for key in ("num_experts", "experts_per_token", "expert_width"))
    S = table.get("num_shared_experts", 0)
    projections = 2 * (D * D + 2 * D * D // 2 + D * D)  # queries, keys and values of half the heads, what comes out
    inside = 3 * D * 80 + 3 * D * F * (K + S) + D * E + (D if table.get("shared_gate") else 0)
    scores = 2 * 2 * D  # two layers, queries and values of all heads
    by_hand = 6 * (projections + inside + D * V) + 6 * scores * length
    assert flops_per_token(settings, V, length, causal=False) == by_hand
    again = 2 * rows * length * length * 2 * D
    assert counted_by_torch(settings, V, rows, length) == pytest.approx(by_hand * rows * length + again, rel=1e-9)


def test_a_steps_operations_are_those_of_its_documents_and_of_the_rows_its_experts_computed(tiny_settings) -> None:
    attention = {"num_heads": 4, "num_kv_heads": 2, "window": 8}
    settings = tiny_settings(pattern=["window", "full"], attention=attention, moe={"num_shared_experts": 1})
    lengths = [40, 3, 1, 20]
    for view in (None, 1, 8, 100):
        seen = [min(place + 1, view or 100) for length in lengths for place in range(length)]
        assert keys_seen(lengths, view) == sum(seen)
    half = settings.num_layers // 2
    assert pairs_seen(settings, lengths) == half * (keys_seen(lengths, 8) + keys_seen(lengths, None))
    assert pairs_seen(settings, lengths, 4) == settings.num_layers * keys_seen(lengths, 4)
    whole = step_flops(settings, 61, 64, pairs_seen(settings, [64]))
    assert whole == pytest.approx(64 * flops_per_token(settings, 61, 64), rel=1e-12)
    assert settings.moe is not None
    slots = settings.num_layers * 64 * settings.moe.experts_per_token
    assert step_flops(settings, 61, 64, pairs_seen(settings, [64]), slots) == whole
    row = 6 * 3 * settings.width * settings.moe.expert_width
    assert whole - step_flops(settings, 61, 64, pairs_seen(settings, [64]), slots - 7) == 7 * row


def test_causal_attention_counts_the_keys_that_are_seen() -> None:
    for length, window in [(1, None), (7, None), (64, 16), (64, 1), (10, 64)]:
        seen = [min(position + 1, window or length) for position in range(length)]
        assert mean_keys(length, window) == pytest.approx(sum(seen) / length)
    assert mean_keys(7, None, causal=False) == 7


def test_windows_and_length_enter_the_operations(tiny_settings) -> None:
    full = tiny_settings()
    windowed = tiny_settings(pattern=["window", "full"], attention={"num_heads": 4, "num_kv_heads": 2, "window": 8})
    per_key = 12 * 4 * 8
    difference = flops_per_token(full, 61, 64) - flops_per_token(windowed, 61, 64)
    assert difference == pytest.approx(2 * per_key * (mean_keys(64, None) - mean_keys(64, 8)))
    growth = flops_per_token(full, 61, 128) - flops_per_token(full, 61, 64)
    assert growth == pytest.approx(4 * per_key * 32)
