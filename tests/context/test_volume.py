"""Bytes counted by hand for small plans, and the summary that a run prints."""

import pytest

from attention.mask import Documents
from context.layout import Layout
from context.plan import Plan, plan
from context.volume import Heads, Volume, summary, volume

HEADS = Heads(num_heads=8, num_kv_heads=2, channels=4, value_channels=6, itemsize=2)
KV, KV_GRADIENT = 2 * (4 + 6) * 2, 2 * (4 + 6) * 4


def made(kind: str, lengths: tuple[int, ...], num_ranks: int, window: int | None = None) -> Plan:
    layout = Layout.make(kind, 1, sum(lengths), num_ranks, lengths)
    return plan(layout, Documents(lengths), window)


def test_a_ring_passes_whole_shares_as_often_as_any_rank_needs() -> None:
    one = made("contiguous", (32,), 4)  # 8 tokens each; distances 1, 2 and 3
    assert volume(one, HEADS, "ring", 0) == Volume(3 * 8 * KV, 3 * 8 * (KV + KV_GRADIENT))
    near = made("contiguous", (32,), 4, window=5)  # the neighbour's keys only
    assert volume(near, HEADS, "ring", 0) == Volume(8 * KV, 8 * (KV + KV_GRADIENT))
    assert volume(made("contiguous", (8, 8, 8, 8), 4), HEADS, "ring", 0) == Volume(0, 0)


def test_gather_sends_everything_to_everyone_or_nothing() -> None:
    assert volume(made("contiguous", (9, 23), 4), HEADS, "gather", 2) == Volume(3 * 8 * KV, 3 * 8 * (KV + KV_GRADIENT))
    assert volume(made("contiguous", (8, 8, 8, 8), 4), HEADS, "gather", 2) == Volume(0, 0)


def test_groupcast_sends_what_others_read_and_returns_gradients_for_what_it_has_read() -> None:
    near = made("contiguous", (6, 26), 4, window=5)
    # Rank 0 holds two tokens of the second document, which rank 1 reads; the others read four of the rank before.
    sent, read = [2, 4, 4, 0], [0, 2, 4, 4]
    for rank in range(4):
        expected = Volume(sent[rank] * KV, sent[rank] * KV + read[rank] * KV_GRADIENT)
        assert volume(near, HEADS, "groupcast", rank) == expected


def test_ulysses_trades_tokens_for_heads_and_repeats_key_heads_that_are_too_few() -> None:
    one = made("contiguous", (32,), 4)  # of 8 heads 2 a rank, of 2 key heads 1 a rank, each on two ranks
    # A rank's heads of a token: q 16 bytes, k and v 20, out 24, log-sum-exp 8, gradients of k and v in fp32 40.
    assert volume(one, HEADS, "ulysses", 1) == Volume(24 * (16 + 20 + 24 + 8), 24 * (16 + 20 + 2 * 24 + 8 + 16 + 40))
    inside = Volume(8 * (32 + 20 + 48 + 16), 8 * (32 + 20 + 2 * 48 + 16 + 32 + 20))  # key heads enough for all
    outside = 1 * 16 * 1 * (4 + 6) * 2  # two groups of 16 tokens; one key head each
    assert volume(one, HEADS, "usp", 1, size_inside=2) == inside + Volume(outside, outside * (1 + 2))
    assert volume(one, HEADS, "usp", 1, size_inside=4) == volume(one, HEADS, "ulysses", 1)
    assert volume(one, HEADS, "usp", 1, size_inside=1) == volume(one, HEADS, "ring", 1)
    assert volume(one, HEADS, "usp", 3, size_inside=1, outside="groupcast") == volume(one, HEADS, "groupcast", 3)


def test_latent_values_do_not_travel_beside_their_keys_and_fp64_stays_fp64() -> None:
    latent = Heads(8, 1, channels=20, value_channels=16, is_latent=True)
    assert (latent.kv_bytes, latent.kv_gradient_bytes) == (40, 80)
    assert Heads(8, 2, 4, 6, itemsize=4).kv_gradient_bytes == Heads(8, 2, 4, 6, itemsize=4).kv_bytes == 80
    assert Heads(8, 2, 4, 6, itemsize=8).kv_gradient_bytes == 160


def test_the_summary_says_what_a_run_will_be_like() -> None:
    lengths = (7, 1, 120, 128)
    layout = Layout.make("contiguous", 2, 128, 2, lengths)
    heads = Heads(4, 2, 64, 64)
    pairs = (57 + 120) * 64 // 2 + (65 + 128) * 64 // 2  # the second halves of both rows
    assert summary(plan(layout, Documents(lengths)), heads).splitlines() == [
        "2 ranks x 128 tokens: 4 documents in 2 rows, chunks of 64 tokens",
        f"work: 1.523 most over mean (rank 1: {pairs:,} pairs), at most 2 pieces and 2 tiles a rank",
        "ring: at most 64.0 KiB sent by a rank forward, 192.0 KiB backward, a layer",
        "gather: at most 64.0 KiB sent by a rank forward, 192.0 KiB backward, a layer",
        "groupcast: at most 60.0 KiB sent by a rank forward, 120.0 KiB backward, a layer",
        "ulysses: at most 97.0 KiB sent by a rank forward, 193.0 KiB backward, a layer",
    ]
    windowed = summary(plan(layout, Documents(lengths), 16), heads).splitlines()
    assert windowed[0].endswith("chunks of 64 tokens, window 16")
    assert windowed[4] == "groupcast: at most 15.0 KiB sent by a rank forward, 30.0 KiB backward, a layer"


@pytest.mark.parametrize(("tokens", "size"), [(1, "40 bytes"), (2**16, "2.5 MiB"), (2**26, "2.5 GiB")])
def test_sizes_are_printed_for_people(tokens: int, size: str) -> None:
    heads = Heads(1, 1, 10, 10, itemsize=2)
    layout = Layout(1, 2 * tokens, 2, (0, 1))
    lines = summary(plan(layout, Documents((2 * tokens,))), heads).splitlines()
    assert lines[2].startswith(f"ring: at most {size} sent")
