"""How fast the device of a rank is at its best: what a run's MFU is a share of."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

PUBLISHED: dict[str, dict[torch.dtype, float]] = {
    # NVIDIA's data sheets: bf16 dense on tensor cores, fp32 without them, as torch multiplies unless told otherwise.
    "H100 PCIe": {torch.bfloat16: 756e12, torch.float32: 51e12},
    "H100 NVL": {torch.bfloat16: 835e12, torch.float32: 60e12},
    "H200 NVL": {torch.bfloat16: 835e12, torch.float32: 60e12},
    "H100": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "H200": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "A100": {torch.bfloat16: 312e12, torch.float32: 19.5e12},
}
"""Operations a second, by a part of the name that torch gives a GPU; the first that fits."""

SECONDS = 0.2
"""How long a product is measured on a CPU."""
QUICK = 2e-3
"""Seconds; what takes less is measured again at twice the size, for a small product does not show what a CPU can."""
MOST_ROWS = 2048


@dataclass(frozen=True)
class Peak:
    """Operations a second that a rank's device could do."""

    flops: float | None
    """None: nobody knows."""
    source: str

    @property
    def facts(self) -> dict[str, Any]:
        """What environment.json says of it."""
        return {"peak_flops": self.flops, "peak_source": self.source}


NOT_KNOWN = Peak(None, "not known")


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """Of this machine's device: as published for a GPU that is known by name, measured for a CPU with its threads."""
    shown = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        threads = torch.get_num_threads()
        what = f"measured, the best product in {shown} on {threads} thread{'s' * (threads > 1)}"
        return Peak(float(f"{_measured_once(dtype, threads):.4g}"), what)
    return published(torch.cuda.get_device_name(device), dtype)


def published(name: str, dtype: torch.dtype) -> Peak:
    """Of the GPU that torch calls so."""
    for part, flops in PUBLISHED.items():
        if part in name and dtype in flops:
            return Peak(flops[dtype], f"published, {part}, dense {str(dtype).removeprefix('torch.')}")
    return Peak(None, f"not known of {name}")


@cache
def _measured_once(dtype: torch.dtype, _threads: int) -> float:
    """A process that runs one after another need not measure again."""
    return measured_product(dtype)


def measured_product(dtype: torch.dtype, seconds: float = SECONDS) -> float:
    """Operations a second of the best product of two square matrices on this CPU, of as many as fit in the time."""
    size, best = 256, 0.0
    matrix = torch.ones(size, size, dtype=dtype)
    torch.mm(matrix, matrix)  # the first of a process makes ready
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        begin = time.perf_counter()
        torch.mm(matrix, matrix)
        taken = max(time.perf_counter() - begin, 1e-9)
        best = max(best, 2 * size**3 / taken)
        if taken < QUICK and size < MOST_ROWS:
            size *= 2
            matrix = torch.ones(size, size, dtype=dtype)
    return best


def remembered(described: Mapping[str, Any], around: Mapping[str, Any]) -> Peak | None:
    """The peak that environment.json says of the same machine, so that all rows of a run are shares of one number.

    described: the file of a run that continues; around: what it would say now.
    """
    last = dict(described)
    for restart in described.get("restarts", []):
        last |= restart
    same = all(last.get(key) == around.get(key) for key in ("machine", "device", "precision", "threads"))
    return Peak(last["peak_flops"], last.get("peak_source") or "") if same and last.get("peak_flops") else None
