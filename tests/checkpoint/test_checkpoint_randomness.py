"""A checkpoint has no generator's state in it, as nothing in training draws from one."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from run.config import load_config

TINY = Path(__file__).parents[1] / "tiny.toml"
DRAWING = {
    "as it is": (),
    "jitter": ("model.moe.router.jitter=0.1",),
    "a loss, recomputed": ("model.moe.balance=[{kind='loss'}]", "recompute=full"),
}


def states() -> list[Any]:
    """Of every generator that a library would draw from of its own accord."""
    words = np.random.get_state(legacy=False)
    return [torch.get_rng_state().tolist(), random.getstate(), words["state"]["key"].tolist(), words["state"]["pos"]]


@pytest.mark.parametrize("kind", DRAWING)
def test_no_step_draws_from_a_generator(here: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """From the first step to behind the last one: batches, forward, backward, optimizer, evaluation and checkpoints."""
    whole: Callable[..., Any] = train.train_step
    seen: list[list[Any]] = []

    def stepping(*arguments: Any) -> Any:
        seen.append(states())
        report = whole(*arguments)
        seen.append(states())
        return report

    monkeypatch.setattr(train, "train_step", stepping)
    train.main(load_config(TINY, list(DRAWING[kind])))
    assert len(seen) == 24 and all(state == seen[0] for state in (*seen, states()))
    torch.rand(1), random.random(), np.random.random()
    assert all(now != then for now, then in zip(states()[:2], seen[0][:2], strict=True)), "it would not be noticed"
