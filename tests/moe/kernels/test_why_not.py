"""Who cannot run the kernels is told why, and importing the package needs nothing that they need."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from moe import kernels


@pytest.fixture
def gpu(monkeypatch):
    """A machine with triton and a GPU of compute capability 9.0; returns what changes it."""
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return monkeypatch


def test_a_machine_that_can(gpu):
    assert kernels.why_not("cuda") is None
    assert kernels.why_not("cpu") == "needs an NVIDIA GPU; this runs on cpu"


def test_each_thing_that_may_be_missing(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0" in kernels.why_not("cuda")
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds none" in kernels.why_not("cuda")
    gpu.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'triton>=3.6'" in kernels.why_not("cuda")


def test_the_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import moe.kernels, moe.kernels.tiles, moe.experts"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=find_spec("moe").submodule_search_locations[0] + "/..")
