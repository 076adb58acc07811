"""What asking costs: counted by torch, never above what was reckoned, and within its share of the training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from context.rotary import DefaultRotary
from evals import cost, needle
from evals.cost import QUESTION, READINGS, suite_flops, task_flops, with_interval
from evals.needle import NeedleSettings
from evals.suite import TASKS, EvalsSettings
from model.initialize import initialize
from model.loss import cross_entropy
from model.size import flops_per_token
from model.transformer import ModelSettings, build_model
from settings import Refusal, Section, read_table, validate
from tests.evals.test_suite import TABLES

QUICKSTART = read_table(Path(__file__).parents[2] / "configs" / "quickstart.toml")
GRID = NeedleSettings(lengths=(96, 128, 256, 512, 1024, 2048), haystack="web", samples=4, one_haystack=True)


def quickstart():
    settings = validate(QUICKSTART["model"], ModelSettings, "")
    model = build_model(settings, 257)
    initialize(model, 0, "cpu")
    model.use_rotary(DefaultRotary(base=1e4))
    return model, settings


def counted(ask) -> int:
    with FlopCounterMode(display=False) as counter:
        ask()
    return counter.get_total_flops()


def test_the_default_grid_costs_two_percent_of_its_interval_at_most(materials):
    """Six lengths, five depths, four haystacks a length: against training steps of the quickstart, both counted."""
    model, settings = quickstart()
    asked = counted(lambda: needle.run(model, GRID, materials, seed=0))
    tokens_BT = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 128)))

    def train():
        hidden_BTD, _ = model(tokens_BT)
        sums = cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, tokens_BT.flatten(), None, 4096)
        sums.weighted.backward()

    of_a_token = counted(train) / tokens_BT.numel()
    evals = with_interval(EvalsSettings(share=0.02, needle=GRID), 1, settings, 257, [128, 512])
    share = asked / (evals.every_tokens * of_a_token)
    assert 0.01 < share <= 0.02
    assert asked <= task_flops(GRID, "needle", 1, settings, 257)
    assert evals.every_tokens < 600_000 < QUICKSTART["total_tokens"] / 8


@pytest.mark.parametrize("task", READINGS)
def test_no_task_reads_more_than_is_reckoned(materials, task):
    model, _ = quickstart()
    read = []
    model.register_forward_pre_hook(lambda module, given: read.append(given[0].numel()))
    table = getattr(validate({task: TABLES[task]}, EvalsSettings, ""), task)
    TASKS[task].run(model, table, materials, 0)
    reckoned = sum(tokens for _, tokens in READINGS[task](table))
    slack = 1.6 if task in ("long_ppl", "last_tokens") else 1.35  # whole rows, and questions shorter than 16 tokens
    assert sum(read) <= reckoned <= slack * sum(read)


def test_every_task_of_ours_is_reckoned():
    assert set(READINGS) <= set(TASKS)
    with pytest.raises(Refusal, match=r"evals.share cannot count what 'riddles' reads; give evals.every_tokens"):
        task_flops(Section(), "riddles", 1, quickstart()[1], 257)


def test_a_suite_costs_what_its_tasks_do():
    settings = quickstart()[1]
    evals = validate({**TABLES, "tasks": ["needle", "held_out", "copying"]}, EvalsSettings, "")
    parts = [task_flops(getattr(evals, name), name, 3, settings, 257) for name in evals.tasks]
    assert suite_flops(evals, 3, settings, 257) == sum(parts)
    needles = sum(2 * 2 * 48 * flops_per_token(settings, 257, 48) / 3 for _ in range(1))
    assert parts[0] == pytest.approx(needles)
    all_sources = validate({"held_out": {"lengths": [32], "tokens": 256}}, EvalsSettings, "")
    one_source = validate({"held_out": {"lengths": [32], "tokens": 256, "sources": ["web"]}}, EvalsSettings, "")
    assert suite_flops(all_sources, 3, settings, 257) == 3 * suite_flops(one_source, 3, settings, 257)


def test_shares_and_lengths_decide_the_interval():
    settings = quickstart()[1]
    evals = EvalsSettings(share=0.02, needle=GRID)
    every = with_interval(evals, 1, settings, 257, [128, 512]).every_tokens
    assert every == with_interval(evals, 1, settings, 257, [512, 128]).every_tokens
    assert with_interval(evals, 1, settings, 257, [512]).every_tokens < every
    half = with_interval(EvalsSettings(share=0.01, needle=GRID), 1, settings, 257, [128]).every_tokens
    assert half == pytest.approx(2 * every, rel=1e-4)
    kept = EvalsSettings(every_tokens=7, needle=GRID)
    assert with_interval(kept, 1, settings, 257, [128]) is kept
    assert with_interval(EvalsSettings(share=0.5), 1, settings, 257, [128]).every_tokens == 1
    with pytest.raises(Refusal, match="both say how often"):
        validate({"share": 0.1, "every_tokens": 5}, EvalsSettings, "")


def test_questions_are_reckoned_long_enough(materials):
    samples = needle.make_grid(GRID, materials, 0, length=96, number=0)
    shared = np.argmax((samples[0].tokens != samples[-1].tokens).cumsum() > 0)
    assert 96 - shared <= QUESTION
    assert list(cost.needle(GRID.model_copy(update={"lengths": (64,)}))) == [(64, 4 * (64 + 5 * QUESTION))]
