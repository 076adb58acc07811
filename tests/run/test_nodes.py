"""The recipes for several nodes, on two torchrun agents of this machine: a rank is lost, then a whole node."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
def test_two_nodes_go_on_when_a_rank_or_a_node_is_lost(tmp_path: Path) -> None:
    """By the campaign, in a process of its own: it forks, and this one has computed."""
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", "0", "--ranks", "2", "--only", "node"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "ok: one rank killed of two nodes" in ended.stdout and "ok: one node killed of two" in ended.stdout
