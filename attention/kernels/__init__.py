"""Triton kernels of attention. Importing this package needs no triton; importing its kernels does."""

import importlib.util

import torch


def why_not() -> str | None:
    """Why these kernels cannot run on this machine, in one clause; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which is not installed: pip install 'triton>=3.6'"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU; torch finds none"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 or newer (Ampere)"
    return None
