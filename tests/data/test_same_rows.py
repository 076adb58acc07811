"""Rows of a plain demand are for ever what they were: a run that began before a key was added goes on unchanged."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batches import Batch, Batches
from data.demand import Demand
from tests.data.texts import fill, settings_of

TENSORS = ("tokens_BT", "labels_BT", "weights_BT", "positions_BT", "places_BT")
PER_ROW = ("sources_B", "rows_B", "keys_B")

# (pack, stage, length, mixture, first sample, samples, rows a micro-batch, rank, ranks) -> digest, of commit c796352.
Case = tuple[str, int, int, tuple[tuple[str, float], ...], int, int, int, int, int]
CASES: dict[Case, str] = {
    ("best_fit", 0, 128, (), 0, 64, 8, 0, 1): "e3716cc552b41527",
    ("best_fit", 1, 512, (), 0, 16, 4, 0, 1): "fd684fce8773272d",
    ("best_fit", 1, 512, (), 9000, 16, 2, 1, 2): "42fd59c31e5ff2ee",
    ("best_fit", 2, 300, (("prose", 2.0), ("code", 1.0)), 37, 24, 3, 3, 4): "ab280c3026ad979f",
    ("best_fit", 0, 160, (("needles", 1.0),), 5, 8, 8, 0, 1): "7cb8d962d85efe1b",
    ("concat", 0, 128, (), 0, 64, 8, 0, 1): "5ca89355b24f7a99",
    ("concat", 3, 256, (("code", 1.0),), 1000, 32, 4, 2, 4): "e0be3122a555797d",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("same"))


def digest(batches: list[Batch]) -> str:
    seal = hashlib.sha256()
    for batch in batches:
        seal.update(np.array([len(batch.lengths), *batch.lengths], dtype=np.int64).tobytes())
        seal.update(np.array([batch.num_targets, batch.num_tokens, batch.num_real], dtype=np.int64).tobytes())
        for name in (*TENSORS, "is_real_BT", *PER_ROW):
            tensor: torch.Tensor = getattr(batch, name)
            seal.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            seal.update(tensor.contiguous().numpy().tobytes())
    return seal.hexdigest()[:16]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_what_they_were(folder: Path, case: Case) -> None:
    pack, stage, length, mixture, first, samples, rows, rank, ranks = case
    demand = Demand(stage, length, dict(mixture))
    batches = Batches(settings_of(folder, pack), seed=7, rank=rank, world_size=ranks)
    assert digest(batches.take(demand, first, samples, rows)) == CASES[case]
    alone = Batches(settings_of(folder, "best_fit"), seed=7)
    spelled_out = replace(demand, pack=pack, stage_length=length)
    assert digest(alone.take(spelled_out, first, samples, rows, rank, ranks)) == CASES[case]
