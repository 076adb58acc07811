"""Will it fit: what is said of the memory of every shipped configuration is what a step of it takes, to a tenth.

One step of the stage that needs most goes through the training loop's own `train_step` on one CPU rank, on rows of
random tokens with two documents each, and the peak of the tensors alive (weights and moments included) is held against
`run.needs`. A configuration whose step is too much work here keeps its kind (layers' pattern, heads shared, router,
optimizer, stages, recomputation) and loses size: by `scale` and by its micro-batch what is counted in tokens, and where
it is wide, width and layers. Rows that several ranks hold together lie on one here; `tests/parallel/test_states.py` has
ranks.
"""

import gc
import itertools
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from context.step_plan import StepPlan
from data.batch import Batch, cut
from data.demand import Demand
from data.rows import Rows
from model.initialize import initialize
from model.kept import Numbers
from model.memory import Memory
from model.size import flops_per_token
from model.transformer import build_model
from optim.groups import build_optimizer
from parallel.apply import parallelize
from parallel.world import World
from run.config import RunConfig, load_config, rows_of_step
from run.needs import needs_of
from run.start import Run
from settings import Refusal
from tests.model.alive import Alive
from tests.test_configs import CONFIGS, ROOT

CPU, NUMBERS, VOCAB_SIZE = torch.device("cpu"), Numbers(4, "cpu"), 257
MOST_WORK, MOST_BYTES = 2e10, 2e9
"""Operations and memory of a step that is taken at its own size: about two seconds of a core that others share."""
LITTLE_WORK = 6e9
"""Of one that is not."""
ALONE = ("parallel={}", "device=cpu", "precision=fp32")


def on_one_rank(path: Path, *overrides: str) -> RunConfig:
    config = load_config(path, [*ALONE, *overrides])
    rows = [f"context.stages.{s.index}.context=1" for s in config.stages if s.settings.context]
    return load_config(path, [*ALONE, *overrides, *rows]) if rows else config


def largest_step(config: RunConfig) -> StepPlan:
    """Of the stage that needs most; of its micro-batches two, as later ones need no more than the second."""
    steps = [stage.longest_step() for stage in config.stages]
    step = max(steps, key=lambda step: needed_of(config, step).total)
    return replace(step, num_tokens=min(2, step.num_samples // rows_of(config, step)) * tokens_of(config, step))


def rows_of(config: RunConfig, step: StepPlan) -> int:
    return rows_of_step(config, step, 1)


def tokens_of(config: RunConfig, step: StepPlan) -> int:
    return rows_of(config, step) * step.sequence_length


def needed_of(config: RunConfig, step: StepPlan) -> Memory:
    return needs_of(config, VOCAB_SIZE, step, 1, NUMBERS)


def is_much(config: RunConfig, most: float = MOST_WORK) -> bool:
    step = largest_step(config)
    work = step.num_tokens * flops_per_token(config.model, VOCAB_SIZE, step.sequence_length)
    return work > most or needed_of(config, step).total > MOST_BYTES


def smaller(config: RunConfig) -> Iterator[str]:
    """Overrides that leave the kinds of things and take away width and layers."""
    model, attention, width = config.model, config.model.attention, 128
    if model.width <= width:
        return
    heads: Any = {
        "num_heads": 4,
        "num_kv_heads": max(1, 4 * getattr(attention, "num_kv_heads", 4) // attention.num_heads),
    }
    layers = max(len(model.pattern), 2)
    dense = layers if model.num_dense_layers == model.num_layers else min(model.num_dense_layers, 1)
    changed = {"width": width, "num_layers": layers, "num_dense_layers": dense}
    changed |= {f"attention.{key}": value for key, value in heads.items()}
    if model.feed_forward_width:
        changed["feed_forward_width"] = model.feed_forward_width * width // model.width
    if model.moe:
        changed["moe.expert_width"] = model.moe.expert_width * width // model.width
    yield from (f"model.{key}={value}" for key, value in changed.items())


def at_hand(path: Path) -> RunConfig:
    """The configuration, or the largest of its kind that a step can be taken of here."""
    config = on_one_rank(path)
    if not is_much(config):
        return config
    narrow = list(smaller(config))
    longest = max(stage.sequence_length for stage in config.stages) * scale_of(path)
    rows = {None: [], 16: [f"tokens_per_microbatch={16 * longest}"], 4: [f"tokens_per_microbatch={4 * longest}"]}
    for fewer, more in itertools.product(rows.values(), range(12)):
        try:
            config = on_one_rank(path, f"scale={scale_of(path) << more}", *narrow, *fewer)
        except Refusal:  # a length, or a step, that it does not divide
            continue
        if not is_much(config, LITTLE_WORK):
            return config
    raise AssertionError(f"{path}: nothing makes it small enough")


def scale_of(path: Path) -> int:
    table = tomllib.loads(path.read_text())
    if "scale" in table or "extends" not in table:
        return int(table.get("scale", 1))
    return scale_of(path.parent / table["extends"])


def two_documents_a_row(step: StepPlan, rows: int) -> list[Batch]:
    length, number = step.sequence_length, step.num_samples
    tokens_RT = np.random.default_rng(0).integers(0, VOCAB_SIZE, (number, length))
    labels_RT = np.roll(tokens_RT, -1, axis=1)
    labels_RT[:, [length // 2 - 1, length - 1]] = -100
    weights_RT, places_R = (labels_RT >= 0).astype(np.float32), np.arange(number)
    halves = np.full(2 * number, length // 2)
    made = Rows(tokens_RT, labels_RT, weights_RT, halves, np.full(number, 2), np.zeros(number, dtype=np.int64))
    settings = step.stage.settings
    demand = Demand(0, length, positions=settings.positions, has_document_mask=settings.has_document_mask)
    return cut(made, demand, np.zeros(number, dtype=np.int64), places_R, places_R, rows)


def peak_of(config: RunConfig, step: StepPlan) -> int:
    """Bytes alive at most in a step of a run that has moments."""
    run = Run(config, Path("runs/none"), CPU, torch.float32, World())
    model = build_model(config.model, VOCAB_SIZE)
    run.layouts = parallelize(model, run.mesh, config, CPU)
    initialize(model, 0, CPU)
    model.use_rotary(step.stage.rotary)
    optimizer, batches = build_optimizer(model, config.optimizer), two_documents_a_row(step, rows_of(config, step))
    weights = [*model.parameters()]
    rows = [value for batch in batches for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    until_moments, whole_step = [], optimizer.step

    def first_step() -> None:
        """Moments are made here: a step that finds them has them beside everything before."""
        until_moments.append(alive.peak)
        alive.peak = alive.bytes
        whole_step()

    optimizer.step = first_step  # type: ignore[method-assign]
    gc.collect()
    with Alive([*weights, *model.buffers(), *rows]) as alive:
        train.train_step(model, optimizer, batches, step, run)
    states = [state for inner in optimizer.optimizers for state in inner.state.values()]
    moments = sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))
    return sum(weight.nbytes for weight in weights) + max(until_moments[0] + moments, alive.peak)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_said_of_a_step_is_what_it_takes(path: Path) -> None:
    torch.manual_seed(0)
    config = at_hand(path)
    step = largest_step(config)
    told, peak = needed_of(config, step), peak_of(config, step)
    assert told.total == pytest.approx(peak, rel=0.1), (told, peak)


@pytest.mark.parametrize("name", ["quickstart", "quickstart_dense", "moe/base", "attention/latent", "context/base"])
def test_small_configurations_are_taken_at_their_own_size(name: str) -> None:
    path = ROOT / "configs" / f"{name}.toml"
    assert at_hand(path) == on_one_rank(path)
