"""What MFU is a share of: published for GPUs known by name, measured on CPUs, one number for a whole run."""

import pytest
import torch

from planning import device
from run import peak
from run.peak import Peak, measured_product, peak_of, published, remembered

CPU = torch.device("cpu")
AROUND = {"machine": "a", "device": "cpu", "precision": "float32", "threads": 1}


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_a_gpu_is_known_by_name_or_not_at_all(name: str, flops: float | None) -> None:
    found = published(name, torch.bfloat16)
    assert found.flops == flops and (flops is not None or name in found.source)
    assert published(name, torch.float16).flops is None


@pytest.mark.parametrize("name", ["a100", "h100", "h200"])
def test_a_run_and_a_plan_know_the_same_peak(name: str) -> None:
    """They stand on different floors, and each has its own table."""
    assert published(f"NVIDIA {name.upper()}", torch.bfloat16).flops == device.published(name).peak


def test_a_cpu_is_measured_with_its_threads_in_the_runs_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(peak, "_measured_once", peak._measured_once.__wrapped__)
    monkeypatch.setattr(peak, "measured_product", lambda dtype: asked.append(dtype) or 123_456_789.0)
    found = peak_of(CPU, torch.bfloat16)
    assert asked == [torch.bfloat16] and found.flops == 123_500_000.0
    assert "bfloat16" in found.source and f"{torch.get_num_threads()} thread" in found.source


def test_the_measured_rate_is_that_of_the_quickest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: products of 256 take 4 ms, so that none is larger; one of them 2.5 ms."""
    sizes: list[int] = []
    seconds = iter([0.0, 0.01, 1.0, 1.004, 0.02, 3.0, 3.0025, 0.03, 5.0, 5.004, 0.3])
    monkeypatch.setattr(peak.time, "perf_counter", lambda: next(seconds))
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: sizes.append(len(a)) or multiply(a, b))
    assert measured_product(torch.float32) == pytest.approx(2 * 256**3 / 0.0025)
    assert set(sizes) == {256}


def test_small_products_give_way_to_larger_ones() -> None:
    assert measured_product(torch.float32, seconds=0.0) > 0


def test_a_run_that_continues_keeps_its_peak_on_the_same_machine() -> None:
    told = {**AROUND, **Peak(5e9, "measured").facts}
    assert remembered(told, AROUND) == Peak(5e9, "measured")
    assert remembered(told, {**AROUND, "threads": 2}) is None
    assert remembered({**told, "restarts": [{"threads": 2, "peak_flops": 9e9}]}, {**AROUND, "threads": 2}) == Peak(
        9e9, "measured"
    )
    assert remembered(AROUND, AROUND) is None and remembered({}, AROUND) is None
