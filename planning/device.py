"""What a rank computes on, in the numbers that a plan needs: known, given, or measured in a second."""

import math
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.kept import Numbers
from parallel.cost import Link, Links
from planning.device_file import FOLDER, DeviceSettings
from planning.speeds import Speeds, alike
from settings import Refusal, load, nearest

EFFICIENCY = 0.4
"""Share of its best product's speed that a device is taken to reach over a whole training step, where none is given."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GLOO = Links(Link(1e9, 50e-6), Link(1e9, 50e-6), 8)
"""Between processes on CPUs: nothing is known of them, so this is a round number."""


@dataclass(frozen=True)
class Ceilings:
    """The best that was measured of a device: see `planning.roofline`."""

    product: float
    """Floating-point operations a second."""
    bandwidth: float
    """Bytes a second."""
    source: str


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
    ceilings: Ceilings | None = None
    """None: nothing was measured."""
    link_names: tuple[str, str] = ("links inside nodes", "links across nodes")

    @property
    def best(self) -> Ceilings:
        """What was measured of it, or, where nothing was, its peak and bandwidth."""
        return self.ceilings or Ceilings(self.peak, self.memory_bandwidth, f"{self.source}, nothing measured")

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


def published(name: str) -> Device:
    """A device that is not here: the name of a file in configs/devices, or the path of one; raises Refusal."""
    path = Path(name)
    if path.suffix != ".toml":
        known = sorted(each.stem for each in FOLDER.glob("*.toml"))
        if name not in known:
            raise Refusal(f"--device {name}: no numbers of such a device{nearest(name, known)}; or give a TOML file")
        path = FOLDER / f"{name}.toml"
    return device_of(load(path, [], DeviceSettings), path.stem)


def device_of(settings: DeviceSettings, name: str) -> Device:
    """The device that a file tells of."""
    inside, across = settings.links.inside, settings.links.across
    links = Links(
        Link(inside.bandwidth * inside.reached, inside.latency),
        Link(across.bandwidth * across.reached, across.latency),
        settings.links.ranks_per_node,
        settings.links.start,
    )
    shares, ceilings = settings.shares, settings.ceilings
    return Device(
        settings.kind,
        name,
        DTYPES[settings.dtype],
        settings.peak,
        int(settings.memory_gib * 2**30),
        settings.bandwidth,
        links,
        None if shares is None else Speeds(**dict(shares)),
        source=settings.source,
        ceilings=None if ceilings is None else Ceilings(**dict(ceilings)),
        link_names=(inside.name, across.name),
    )


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
    if not 1e3 <= rate <= 1e30:  # nor NaN, which is neither
        raise Refusal(f"--rate {rate:g}: give floating-point operations a second, such as 120e12")
    source = "given, of a whole step"
    return replace(device, peak=rate, shares=None, efficiency=1.0, source=source, ceilings=None)


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
