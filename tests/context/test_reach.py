"""How far a rotation reaches: the papers' own numbers, and a plain loop."""

import math

import pytest
import torch

from context.frequencies import frequencies
from context.reach import CHUNK, critical_channels, first_distance_disliked, liking, notes
from context.rotary import DefaultRotary, Llama3Rotary, NoRotary, RotaryMap
from tests.context.rotations import SPECS


def reach(base: float, length: int, channels: int = 128) -> int | None:
    return first_distance_disliked(frequencies(DefaultRotary(base=base), channels)[0], length)


@pytest.mark.parametrize(("length", "base"), [(4096, 2.7e4), (32_768, 6.4e5), (131_072, 7.8e6)])
def test_least_bases_of_the_paper(length: int, base: float) -> None:
    """Table 2, whose bases have two digits: they reach (nearly) the length they are given for, smaller ones less."""
    distance = reach(base, length) or length
    assert 0.84 * length < distance
    assert (reach(base * 0.7, length) or length) < 0.85 * distance


def test_the_first_distance_is_the_first() -> None:
    speeds = frequencies(DefaultRotary(base=100.0), 8)[0]
    plain = [sum(math.cos(m * w) for w in speeds.tolist()) for m in range(60)]
    assert liking(speeds, torch.arange(60)).tolist() == pytest.approx(plain, abs=1e-12)
    first = next(m for m, value in enumerate(plain) if value < 0)
    assert first_distance_disliked(speeds, 60) == first == first_distance_disliked(speeds, first + 1)
    assert first_distance_disliked(speeds, first) is None


def test_distances_past_the_first_chunk_are_seen() -> None:
    slow = torch.tensor([2.0 / CHUNK])  # a quarter of a turn lies past the first chunk
    quarter = math.ceil(math.pi / 2 / (2.0 / CHUNK))
    assert first_distance_disliked(slow / 2, 2 * CHUNK) == math.ceil(math.pi / 2 / (1.0 / CHUNK))
    assert first_distance_disliked(slow, 2 * CHUNK) == quarter


@pytest.mark.parametrize(("channels", "base", "length", "wanted"), [(96, 1e4, 2048, 62), (128, 5e5, 8192, 70)])
def test_critical_channels_of_phi_3_and_llama_3(channels: int, base: float, length: int, wanted: int) -> None:
    assert critical_channels(base, channels, length) == wanted


def test_notes() -> None:
    llama = Llama3Rotary(base=5e5, factor=8, original_length=8192)
    (note,) = notes(llama, 128, 8192)
    assert note == "29 of 64 pairs made no whole turn within the original 8,192 tokens"
    (far,) = notes(DefaultRotary(base=1e4), 128, 32_768)
    assert far.startswith(f"at distance {reach(1e4, 32_768):,} of 32,768")
    assert not [*notes(NoRotary(), 128, 32_768)]
    both = RotaryMap(full=llama, window=DefaultRotary(base=1e4))
    assert [note.split(":")[0] for note in notes(both, 128, 32_768)] == ["full layers", "window layers"]
    for spec in SPECS.values():
        assert len([*notes(spec, 32, 64)]) <= 2
