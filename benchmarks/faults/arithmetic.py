"""Faults of arithmetic as a run meets them: what `inject.py` brings in, and how that has to end."""

import math
from collections.abc import Callable

from benchmarks.faults.bench import Bench, Outcome
from benchmarks.faults.cases import refusal
from benchmarks.faults.compare import read
from benchmarks.faults.inject import spoiled_gradient, turned_weights
from benchmarks.faults.lives import Life, Start, known, succeeded
from benchmarks.faults.moments import newest_checkpoint

HIT = 8
"""The step that goes wrong."""
SKIP, ROLL_BACK = (f"guard.spike={{window = 6, deviations = 8.0, action = '{a}'}}" for a in ("skip", "roll_back"))
MICROBATCHES = {1: 4, 2: 2, 4: 1}
"""Of each rank in a step of run.toml, by the number of ranks."""


def nan(bench: Bench, ranks: int) -> Outcome:
    """A NaN in one gradient of one rank: no checkpoint may hold it, and someone has to say so."""
    rank = ranks - 1
    prepare = spoiled_gradient(HIT, math.nan, MICROBATCHES[ranks], rank)
    return _go_wrong(bench, ranks, "a NaN in a gradient" + " of one rank" * (ranks > 1), prepare)


def gradient_spike(bench: Bench, ranks: int) -> Outcome:
    """One gradient of one rank is far too large, and the step is skipped."""
    prepare = spoiled_gradient(HIT, 1e6, MICROBATCHES[ranks], ranks - 1)
    return _go_wrong(bench, ranks, "a gradient 10^6 too large", prepare, *known(SKIP))


def loss_spike(bench: Bench, ranks: int) -> Outcome:
    """The weights jump, and the loss with them: nothing helps but to go back."""
    return _go_wrong(bench, ranks, "a loss spike", turned_weights(HIT), *known(ROLL_BACK))


def _go_wrong(bench: Bench, ranks: int, fault: str, prepare: Callable[[], None], *overrides: str) -> Outcome:
    """Both ends are right: refused with status 2, or said by name and trained on with finite numbers to the end."""
    with bench.fresh(ranks) as start:
        start = start.prepared(prepare).with_keys(*overrides)
        with Life(start) as life:
            statuses = life.wait()
            if succeeded(statuses):
                ended, problems = "told, and trained on", _went_on(start)
            else:
                ended, problems = "refused, status 2", refusal(life, "step ")
            problems += [] if any(f"step {step}" in life.said for step in (HIT, HIT + 1)) else ["nobody named the step"]
        problems += _whole_checkpoints(start)
    return Outcome(fault, ranks, 1, ended, problems)


def _went_on(start: Start) -> list[str]:
    rows = read(start.run / "metrics.jsonl")
    return [f"step {row['step']}: the loss is {row.get('loss')}" for row in rows if row.get("loss") is None]


def _whole_checkpoints(start: Start) -> list[str]:
    """No number in the newest checkpoint may be none."""
    from checkpoint.checkpoints import read_checkpoint

    if not newest_checkpoint(start.run):
        return ["no checkpoint is left"]
    _, _, weights = read_checkpoint(start.run)
    return [f"{name} is not finite" for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
