"""Runs of tests/tiny.toml of which some steps go wrong, by their number; and what is left of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import run.update
import train
from model.transformer import Transformer
from optim.groups import Optimizer
from parallel.gradients import Parameters
from run.config import RunConfig, load_config
from run.start import Run

TINY = Path(__file__).parents[1] / "tiny.toml"
TOKENS_PER_STEP = 512

Edit = Callable[[Tensor], object]
NAN: Edit = lambda gradient: gradient.view(-1)[:1].fill_(torch.nan)  # noqa: E731
LARGE: Edit = lambda gradient: gradient.mul_(1e9)  # noqa: E731


def tiny(*overrides: str) -> RunConfig:
    return load_config(TINY, list(overrides))


def poison(monkeypatch: pytest.MonkeyPatch, steps: Mapping[int, Edit]) -> None:
    """Edit one gradient at each of these steps, whichever process comes to them."""
    whole_step, whole_sum, now = train.train_step, run.update.sum_gradients, [0]

    def step_of_known_number(*arguments: Any) -> train.StepReport:
        now[0] = arguments[3].end_tokens // TOKENS_PER_STEP
        return whole_step(*arguments)

    def sum_and_edit(parameters: Parameters, *arguments: Any) -> None:
        whole_sum(parameters, *arguments)
        gradient = parameters["embedding.weight"].grad
        if now[0] in steps and gradient is not None:
            steps[now[0]](gradient)

    monkeypatch.setattr(train, "train_step", step_of_known_number)
    monkeypatch.setattr(run.update, "sum_gradients", sum_and_edit)


def everything(model: Transformer, optimizer: Optimizer) -> list[Tensor]:
    """Copies of all that a step changes: weights, biases, moments and their counts."""
    moments = [value for inner in optimizer.optimizers for state in inner.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*model.state_dict().values(), *moments)]


def watch_changes(monkeypatch: pytest.MonkeyPatch) -> dict[int, bool]:
    """Fills in, by step, whether anything of `everything` changed."""
    whole_step, has_changed = train.train_step, {}

    def watched(model: Transformer, optimizer: Optimizer, batches: Any, step: Any, run: Run) -> train.StepReport:
        before = everything(model, optimizer)
        report = whole_step(model, optimizer, batches, step, run)
        after = everything(model, optimizer)
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        has_changed[step.end_tokens // TOKENS_PER_STEP] = not same
        return report

    monkeypatch.setattr(train, "train_step", watched)
    return has_changed


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the process fall over as it begins this step, as if the power had failed."""
    whole_step = train.train_step

    def falling(*arguments: Any) -> train.StepReport:
        if arguments[3].end_tokens == step * TOKENS_PER_STEP:
            raise KeyboardInterrupt("the power failed")
        return whole_step(*arguments)

    monkeypatch.setattr(train, "train_step", falling)
