"""A fingerprint for every expert: what a file's digest cannot say is that expert 5 still is expert 5.

Experts are stacked along the first dimension. Each gets a digest of its own when it is written, and whoever reads it
computes that again: an expert that was permuted, doubled or lost between two tools is named.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

DIGEST_BYTES = 8


class OtherExpert(Exception):
    """An expert is not the one that was saved; the message names the tensor and the expert."""


def has_experts(name: str) -> bool:
    """Whether a tensor holds experts one after another: their weights, and their moments."""
    return ".feed_forward.experts." in f".{name}"


def fingerprints(experts: Tensor) -> list[str]:
    """Of each expert's bytes, hexadecimal; experts: (E, ...) on the CPU."""
    return [hashlib.blake2b(bytes_of(expert), digest_size=DIGEST_BYTES).hexdigest() for expert in experts]


def check_experts(name: str, experts: Tensor, first: int, saved: Sequence[str]) -> None:
    """Raise OtherExpert where experts are not those that were saved.

    experts: (e, ...), so many of them from number `first` on; saved: the fingerprints of all.
    """
    for number, found in enumerate(fingerprints(experts), start=first):
        if number >= len(saved) or found != saved[number]:
            equal = f" (it equals expert {saved.index(found)})" if found in saved else ""
            raise OtherExpert(f"{name}: expert {number} is not what was saved{equal}")


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in its own memory where that is in one piece."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
