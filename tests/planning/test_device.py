"""The numbers of a device: published ones, given ones, measured ones."""

import pytest
import torch

from planning.device import EFFICIENCY, PUBLISHED, measured_product, published, this_device, with_rate
from settings import Refusal

CPU = torch.device("cpu")


def test_a_device_that_is_not_here_is_known_by_name() -> None:
    assert published("h200").memory == PUBLISHED["h200"].memory and published("h100").rate == 989e12 * EFFICIENCY
    assert published("h200").memory > published("h100").memory
    with pytest.raises(Refusal, match=r"--device h20: .*did you mean 'h200'"):
        published("h20")


def test_a_rate_that_is_given_is_taken_as_it_is() -> None:
    device = with_rate(published("h100"), 120e12)
    assert device.rate == 120e12 and device.memory == published("h100").memory and "given" in device.source
    assert this_device(CPU, torch.float32, 5e9).rate == 5e9
    with pytest.raises(Refusal, match="--rate -1"):
        with_rate(device, -1)


def test_the_device_that_is_here_is_measured() -> None:
    speed = measured_product(CPU, torch.float32, 64, seconds=0.0)
    assert 1e6 < speed < 1e15
    device = this_device(CPU, torch.float32)
    assert 1e8 < device.peak < 1e15 and device.rate == device.peak * EFFICIENCY
    assert "1,024 x 1,024 in float32" in device.source and device.kind == "cpu"
    assert device.memory is not None and device.memory > 2**28
