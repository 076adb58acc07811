"""What changes where a stage begins or goes on, in whole runs: moments, lengths, windows; broken off and gone on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from checkpoint.checkpoints import read_checkpoint
from context.step_plan import StepPlan
from data.batches import Batch, Batches
from model.initialize import initialize
from model.transformer import Transformer, build_model
from optim.groups import Optimizer
from parallel.world import World
from run import microbatches as passes
from run.config import RunConfig, load_config
from run.demand import demand_of
from run.start import Run
from settings import Refusal
from tests.test_train import TINY, die_at

RESET = "context.stages.1.moments=reset"
FIRST = "context.stages.0"
SECOND = "context.stages.1"
LONGER = f"{FIRST}.sequence_length=128"
GROW_P2 = f"{FIRST}.growth={{kind = 'power_of_two', shortest = 32, cycles = 2}}"
WINDOW = f"{FIRST}.growth={{kind = 'window', start = 8, rate = 4.0, end = 24}}"
CHANGES = {
    "grow_p2": (LONGER, GROW_P2, f"{SECOND}.mixture_unit=documents"),
    "linear": (LONGER, f"{FIRST}.growth={{kind = 'linear', start = 32}}", f"{SECOND}.sequence_length=32"),
    "window": (WINDOW, f"{SECOND}.tokens_per_step=256"),
}
NO_EVALS = ("evals.at_stage_ends=false", "evals.every_tokens=1000000", "data.sources.needles.fractions=[1.0]")
pytestmark = pytest.mark.usefixtures("here")


def tiny(*overrides: str) -> RunConfig:
    return load_config(TINY, [*NO_EVALS, *overrides])


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


def bits(name: str) -> list[tuple[float, ...]]:
    """What no breaking off may change."""
    keys = ("step", "tokens", "stage", "sequence_length", "loss", "gradient_norm", "learning_rate")
    return [tuple(row[key] for key in keys) for row in rows(name)]


def weights(name: str) -> dict[str, Tensor]:
    return read_checkpoint(f"runs/{name}")[2]


def watch(monkeypatch: pytest.MonkeyPatch, look: Callable[[Optimizer, list[Batch], StepPlan], Any]) -> list[Any]:
    """What `look` sees right before each step."""
    seen: list[Any] = []
    whole = train.train_step

    def watched(model: Transformer, optimizer: Optimizer, batches: list[Batch], step: StepPlan, run: Any) -> Any:
        seen.append(look(optimizer, batches, step))
        return whole(model, optimizer, batches, step, run)

    monkeypatch.setattr(train, "train_step", watched)
    return seen


def num_moments(optimizer: Optimizer, *_: object) -> int:
    return sum(len(inner.state) for inner in optimizer.optimizers)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_are_forgotten_before_the_stages_first_step_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch, num_moments)
    train.main(tiny(RESET, f"optimizer.kind={kind}"))
    assert len(seen) == 12 and [step for step, count in enumerate(seen) if count == 0] == [0, 8]
    kept = watch(monkeypatch, num_moments)
    train.main(tiny("name=kept", f"optimizer.kind={kind}"))
    assert [step for step, count in enumerate(kept) if count == 0] == [0]


def test_the_first_step_after_a_reset_is_that_of_a_new_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's first step from nothing moves each weight by the whole rate: only the count of steps says so."""
    steps = watch(monkeypatch, lambda optimizer, *_: [float(s["step"]) for s in optimizer.optimizers[0].state.values()])
    train.main(tiny(RESET, "optimizer.kind=adamw"))
    assert {*steps[7]} == {7.0} and steps[8] == [] and {*steps[9]} == {1.0}


# 9: what is restored is the checkpoint of the boundary, with the old moments. 11: that of step 9, with new ones.
@pytest.mark.parametrize("broken_at", [9, 11])
def test_a_run_broken_around_a_reset_goes_on_bit_for_bit(broken_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train.main(tiny("name=whole", RESET))
    with monkeypatch.context() as broken:
        die_at(broken_at, broken)
        with pytest.raises(KeyboardInterrupt):
            train.main(tiny("name=broken", RESET))
    seen = watch(monkeypatch, num_moments)
    train.main(tiny("name=broken", RESET))
    assert bits("broken") == bits("whole")
    ours, theirs = weights("broken"), weights("whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lands_on_it = broken_at == 9
    assert (seen[0] == 0) == lands_on_it and all(seen[1:])


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_whose_steps_differ_goes_on_bit_for_bit(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every length, window, step and unit; broken off in the first stage and in the second."""
    overrides = (*CHANGES[change], "checkpoint.every_steps=3")
    plans = watch(monkeypatch, lambda _, batches, step: (step, sum(batch.num_tokens for batch in batches)))
    train.main(tiny("name=whole", *overrides))
    stages = tiny(*overrides).stages
    expected = [stage.step(number) for stage in stages for number in range(stage.num_steps)]
    assert [(step.start_tokens, step.sequence_length, step.first_sample, step.window) for step, _ in plans] == [
        (step.start_tokens, step.sequence_length, step.first_sample, step.window) for step in expected
    ]
    assert all(tokens == step.num_tokens for step, tokens in plans)
    assert [row["sequence_length"] for row in rows("whole")] == [step.sequence_length for step in expected]
    with monkeypatch.context() as broken:
        for broken_at in (5, 7):  # the second counts from step 4 on, after the checkpoint of step 3
            die_at(broken_at, broken)
            with pytest.raises(KeyboardInterrupt):
                train.main(tiny("name=broken", *overrides))
    train.main(tiny("name=broken", *overrides))
    assert bits("broken") == bits("whole")


def test_rows_of_a_growing_stage_are_those_of_their_length_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the steps of one length took is one unbroken stretch of that length's samples."""
    config = tiny(LONGER, GROW_P2)
    taken = watch(monkeypatch, lambda _, batches, step: (step, torch.cat([batch.tokens_BT for batch in batches])))
    train.main(config)
    batches = Batches(config.data, seed=config.seed)
    for length in (32, 64, 128):
        mine = [(step, tokens) for step, tokens in taken if (step.stage.index, step.sequence_length) == (0, length)]
        together = torch.cat([tokens for _, tokens in mine])
        first = next(step for step in config.stages.first_steps() if step.sequence_length == length)
        (whole,) = batches.take(demand_of(first, batches), 0, len(together), len(together))
        assert torch.equal(whole.tokens_BT, together)
    assert taken[0][0].sequence_length == 128, "the longest come first"


def test_a_training_window_narrows_every_layer_and_no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[tuple[bool, int | None]] = []
    whole = Transformer.forward

    def watched(
        self: Transformer, tokens: Tensor, positions: Any = None, mask: Any = None, *rest: Any, **more: Any
    ) -> Any:
        windows.append((self.training and torch.is_grad_enabled(), None if mask is None else mask.window))
        return whole(self, tokens, positions, mask, *rest, **more)

    monkeypatch.setattr(Transformer, "forward", watched)
    train.main(load_config(TINY, [WINDOW, "trial=false"]))
    trained = [window for is_training, window in windows if is_training]
    assert trained == [window for window in (8, 12, 16, 20, 24, 24, 24, 24) for _ in range(2)] + [None] * 8
    asked = [window for is_training, window in windows if not is_training]
    assert len(asked) > 20 and {window for window in asked if window is not None} <= {8, 12, 16, 20, 24}, (
        "looked at again"
    )


def test_what_a_training_window_hides_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token further back than all layers' windows together reach is not seen; without the window it is."""
    config = tiny("model.num_dense_layers=2")
    batches = Batches(config.data, seed=0)
    run = Run(config, Path("runs/none"), torch.device("cpu"), torch.float32, World())
    model = build_model(config.model, batches.tokenizer.vocab_size)
    initialize(model, 0, run.device)
    model.use_rotary(config.stages[0].rotary)
    step = config.stages.step(0)
    (batch,) = batches.take(demand_of(step, batches), 0, 1, 1)
    batch.tokens_BT.random_(1, 250)
    whole = replace(batch, lengths=(64,))
    other = replace(whole, tokens_BT=whole.tokens_BT.clone())
    other.tokens_BT[0, 10] += 1
    with torch.no_grad():
        for window, reaches in ((4, 10 + 2 * 3), (None, 63)):  # two layers, each three tokens farther
            a, b = (passes.forward(model, x, run, window)[0] for x in (whole, other))
            changed = (a != b).any(-1)[0].nonzero().flatten().tolist()
            assert min(changed) == 10 and max(changed) == reaches


def test_a_mixture_of_documents_becomes_one_of_tokens() -> None:
    config = tiny("context.stages.1.mixture_unit=documents", "context.stages.1.mixture={words = 1.0, needles = 1.0}")
    batches = Batches(config.data, seed=0)
    step = config.stages[1].step(0)
    demand = demand_of(step, batches)
    means, shares = batches.mean_document_lengths(demand), demand.mixture
    assert means["words"] > 1000 and means["needles"] <= 128
    assert shares["words"] / shares["needles"] == pytest.approx(means["words"] / means["needles"])
    assert sum(shares.values()) == pytest.approx(1.0)
    assert demand_of(config.stages[0].step(0), batches).mixture == {}, "the sources' own weights"
    with pytest.raises(Refusal, match=r"stages\.1: mixture_unit=\"documents\"|mixture_unit='documents' is the unit of"):
        tiny("context.stages.0.mixture_unit=documents")


def test_only_the_longest_rows_of_a_stage_that_shrinks_are_its_longest(here: Path) -> None:
    """Or pieces of a decomposed document would be dealt out at every length."""
    stage = "context.stages.1.{}".format
    config = load_config(TINY, [stage("growth={kind = 'linear', start = 256}"), stage("pack=decompose")])
    batches = Batches(config.data, seed=0)
    demands = [demand_of(step, batches) for step in config.stages[1].first_steps()]
    assert len(demands) > 1
    assert [each.is_longest for each in demands] == [each.sequence_length == 256 for each in demands]
