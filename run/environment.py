"""Versions, commit and machine: what a number needs beside it to be found again."""

import os
import platform
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

PACKAGES = {"torch", "numpy", "safetensors", "pydantic", "tokenizers", "tiktoken", "triton"}
"""Those whose version may change a number."""


def environment(device: torch.device, dtype: torch.dtype, ranks: int) -> dict[str, Any]:
    """Versions, commit and machine: what a number needs beside it to be found again."""
    versions = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"] in PACKAGES}
    return {
        "python": platform.python_version(),
        "packages": dict(sorted(versions.items())),
        "commit": commit(),
        "machine": machine(device),
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def commit() -> str:
    """The git commit of the source, with `+` where the tree differs from it; `unknown` outside git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: torch.device) -> str:
    """The GPU's name, or the processor's and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
