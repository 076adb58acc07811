"""What a rank computes on, in the numbers that a plan needs: known, given, or measured in a second."""

import math
import os
import platform
import time
from dataclasses import dataclass, replace

import torch

from model.kept import Numbers
from parallel.cost import Link, Links
from planning.speeds import AMPERE, CARD, CARD_HOP, HOPPER, NVLINK, NVLINK_HOP, START, Speeds, alike
from settings import Refusal, nearest

EFFICIENCY = 0.4
"""Share of its best product's speed that a device is taken to reach over a whole training step, where none is given."""

GLOO = Links(Link(1e9, 50e-6), Link(1e9, 50e-6), 8)
"""Between processes on CPUs: nothing is known of them, so this is a round number."""


@dataclass(frozen=True)
class Device:
    """One rank's device."""

    kind: str
    """`cpu` or `cuda`: what torch calls it."""
    name: str
    dtype: torch.dtype
    """What products take."""
    peak: float
    """Floating-point operations a second of the fastest product in `dtype`."""
    memory: int | None = None
    """Bytes; None: not known."""
    memory_bandwidth: float = math.inf
    """Bytes a second between it and its memory; of use with shares of its own."""
    links: Links = GLOO
    """What joins it to others."""
    shares: Speeds | None = None
    """What it reaches by what it does; None: the same share of its peak, `efficiency`, in everything."""
    efficiency: float = EFFICIENCY
    source: str = "as published"
    """Where `peak` is from."""

    @property
    def numbers(self) -> Numbers:
        """How it holds what is kept from forward to backward."""
        return Numbers(self.dtype.itemsize, self.kind)

    @property
    def rate(self) -> float:
        """Floating-point operations a second over a whole step, where all of it is taken alike."""
        return self.peak * self.efficiency

    @property
    def speeds(self) -> Speeds:
        """What time rests on."""
        return self.shares or alike(self.efficiency)


def nvlinked(nvlink: float, card: float) -> Links:
    """Nodes of eight GPUs with so many bytes a second of NVLink in one direction, and of a network card, for each."""
    return Links(Link(nvlink * NVLINK, NVLINK_HOP), Link(card * CARD, CARD_HOP), 8, START)


def nvidia(name: str, peak: float, memory: int, memory_bandwidth: float) -> Device:
    """One of NVIDIA's, with shares and links of its generation, and a network card of 400 Gb/s (A100: 200)."""
    shares, links = (AMPERE, nvlinked(300e9, 25e9)) if name == "a100" else (HOPPER, nvlinked(450e9, 50e9))
    return Device("cuda", name, torch.bfloat16, peak, memory * 2**30, memory_bandwidth, links, shares)


PUBLISHED = {
    # NVIDIA's data sheets: dense bf16, NVLink in one direction; of memory what torch finds, which is less than is sold.
    device.name: device
    for device in (
        nvidia("a100", 312e12, 79, 2.04e12),
        nvidia("h100", 989e12, 79, 3.35e12),
        nvidia("h200", 989e12, 139, 4.8e12),
    )
}


def published(name: str) -> Device:
    """A device that is not here, by name; raises Refusal for one that is not known."""
    if name not in PUBLISHED:
        raise Refusal(f"--device {name}: no numbers of such a device{nearest(name, list(PUBLISHED))}")
    return PUBLISHED[name]


def this_device(device: torch.device, dtype: torch.dtype, rate: float | None = None) -> Device:
    """The device that is here: its product measured for a second, unless the rate of a whole step is given."""
    name, memory = _name_and_memory(device)
    here = Device(device.type, name, dtype, 0.0, memory)
    if rate is not None:
        return with_rate(here, rate)
    size = 8192 if device.type == "cuda" else 1024
    peak = measured_product(device, dtype, size)
    shown = str(dtype).removeprefix("torch.")
    return replace(here, peak=peak, source=f"measured, a product of {size:,} x {size:,} in {shown}")


def with_rate(device: Device, rate: float) -> Device:
    """The same device where a whole step reaches so many operations a second."""
    if not 0 < rate < math.inf:  # nor NaN, which is neither
        raise Refusal(f"--rate {rate:g}: give floating-point operations a second, such as 120e12")
    return replace(device, peak=rate, shares=None, efficiency=1.0, source="given, of a whole step")


def with_efficiency(device: Device, efficiency: float) -> Device:
    """The same device where a whole step reaches this share of its best product's speed."""
    if not 0 < efficiency <= 1:
        raise Refusal(f"--efficiency {efficiency:g}: give a share above 0 and up to 1, such as {EFFICIENCY}")
    return replace(device, shares=None, efficiency=efficiency)


def measured_product(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 1.0) -> float:
    """The best of as many products of two square matrices as fit in the time: operations a second."""
    left = torch.ones(size, size, dtype=dtype, device=device)
    out, best, end = torch.empty_like(left), float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        torch.mm(left, left, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _name_and_memory(device: torch.device) -> tuple[str, int | None]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)", pages
