"""Queries that grow with position: the published formulae, nothing before the first step, never a change of dtype."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from attention.temperature import LogTemperature, StepTemperature, TemperatureSettings, scaled


def factors(settings: TemperatureSettings, positions: list[int]) -> list[float]:
    q_BTHC = torch.ones(1, len(positions), 2, 4, dtype=torch.float64)
    scaled_BTHC = scaled(settings, q_BTHC, torch.tensor([positions]))
    assert (scaled_BTHC == scaled_BTHC[..., :1, :1]).all()
    return scaled_BTHC[0, :, 0, 0].tolist()


def test_steps_are_llama_4s() -> None:
    """Against the expression of its released code, at the borders of steps and far out."""
    positions = [0, 8190, 8191, 8192, 16_382, 16_383, 10_000_000]
    wanted = [1 + 0.1 * math.log(math.floor((p + 1) / 8192) + 1) for p in positions]
    assert factors(StepTemperature(length=8192), positions) == pytest.approx(wanted, rel=1e-6)
    assert wanted[0] == wanted[1] == 1 < wanted[2]


def test_logarithm_of_the_number_of_keys() -> None:
    positions = [0, 510, 511, 512, 1023, 262_143]
    wanted = [1, 1, 1, math.log(513) / math.log(512), 10 / 9, 2]
    assert factors(LogTemperature(length=512), positions) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("settings", [StepTemperature(length=2), LogTemperature(length=2)])
def test_the_dtype_stays(settings: TemperatureSettings) -> None:
    q_BTHC = torch.randn(1, 9, 2, 4).bfloat16()
    out = scaled(settings, q_BTHC, torch.arange(9)[None])
    assert out.dtype == torch.bfloat16 and out.shape == q_BTHC.shape and torch.equal(out[:, 0], q_BTHC[:, 0])
    assert not torch.equal(out[:, 8], q_BTHC[:, 8])


def test_settings_are_told_apart_by_kind() -> None:
    adapter = TypeAdapter(TemperatureSettings)
    assert adapter.validate_python({"kind": "log", "length": 4}) == LogTemperature(length=4)
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        adapter.validate_python({"kind": "log", "length": 1})
    with pytest.raises(ValidationError, match="length"):
        adapter.validate_python({"kind": "steps"})
