"""Who cannot run the kernels is told why, and asking needs nothing that they need."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from attention import kernels
from attention.backends.triton import Triton
from attention.contract import Needs, missing


@pytest.fixture
def gpu(monkeypatch):
    """A machine with triton and a GPU of compute capability 9.0; returns what changes it."""
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return monkeypatch


def test_each_thing_that_may_be_missing(gpu):
    assert Triton().unavailable() is None
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0" in Triton().unavailable()
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds none" in Triton().unavailable()
    gpu.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'triton>=3.6'" in Triton().unavailable()


def test_what_it_can_do():
    every = {name: True for name in Needs.__dataclass_fields__ if name not in ("device", "dtype", "channels")}
    assert missing(Triton.capability, Needs("cuda", torch.bfloat16, channels=256, **every)) == []
    assert len(missing(Triton.capability, Needs("cpu", torch.float64, channels=257))) == 3


def test_the_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import attention.core, attention.kernels.blocks"
    folder = find_spec("attention").submodule_search_locations[0]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=f"{folder}/..")
