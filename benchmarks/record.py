"""What stands beside every number of a benchmark: commit, machine, versions, date."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from run.environment import commit, machine

RESULTS = Path(__file__).parent / "results"


def keep(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write the rows of one benchmark to benchmarks/results/<name>.json, replacing what an earlier run left."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    around = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(device),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**around, "rows": rows}, indent=1) + "\n")
    return path
