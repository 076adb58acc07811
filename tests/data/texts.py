"""A small corpus made of integers alone, so that no library's random stream decides what stands in it."""

from pathlib import Path

import numpy as np

from data.batches import DataSettings
from data.order import counted
from settings import validate


def fill(folder: Path) -> Path:
    """Eighty long and eighty short texts below `folder`; the folder itself."""
    for seed, (name, spread) in enumerate((("prose", 900), ("code", 90))):
        (folder / name).mkdir()
        for number, draw in enumerate((counted(seed, np.arange(80)) % np.uint64(spread)).tolist()):
            words = (counted(seed * 1000 + number, np.arange(1 + draw)) % np.uint64(5000)).tolist()
            (folder / name / f"{number:02d}.txt").write_text(" ".join(f"w{word}" for word in words))
    return folder


def settings_of(folder: Path, pack: str = "best_fit") -> DataSettings:
    held_out = {"kind": "text", "held_out": 0.1}
    sources = {
        "prose": {"path": str(folder / "prose"), "weight": 0.3, **held_out},
        "code": {"path": str(folder / "code"), "weight": 0.2, **held_out},
        "needles": {"kind": "recall", "haystack": "prose", "weight": 0.5, "answer_weight": 8.0, "needles": 2},
    }
    table = {"sources": sources, "prepared": str(folder / "prepared"), "pack": pack}
    return validate(table, DataSettings, "test")
