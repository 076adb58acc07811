"""What a configuration may say of recomputation, and what a memory budget makes of it."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from checkpoint.identity import read_recorded
from model.block import Block, Kind
from model.kept import Numbers
from model.memory import memory, states
from model.repeated import repeated_flops
from model.share import Share, States
from model.transformer import build_model
from parallel import budget
from parallel.budget import Choice, Layer, cheapest
from parallel.recompute import KINDS, BudgetSettings, in_words, recompute_layers, size_in_bytes
from parallel.world import World
from run.config import RunConfig, load_config
from run.entry import take_shape
from run.needs import kinds_of, needs_of
from run.start import Run
from run.ways import choose_kinds
from settings import Refusal, to_toml

TINY = Path(__file__).parents[1] / "tiny.toml"
FP32 = Numbers(4, "cpu")
VOCAB_SIZE = 257
DEEP = (
    "model.num_layers=4",
    "model.attention.window=16",
    "model.pattern=['window', 'full']",
    "tokens_per_microbatch=256",
)
"""Layers of three kinds: a dense one with a window, experts with and without."""


def config_of(*overrides: str) -> RunConfig:
    return load_config(TINY, list(overrides))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("true", "ops"),
        ("false", "none"),
        ("none", "none"),
        ("ops", "ops"),
        ("full", "full"),
        ('{ budget = "20 GB" }', BudgetSettings(budget="20 GB")),
    ],
)
def test_what_may_be_written_and_what_old_runs_wrote(written: str, meant: Any) -> None:
    config = config_of(f"recompute={written}")
    assert config.recompute == meant
    assert read_recorded(to_toml(config), RunConfig, "there") == config


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("opps", "recompute=\"opps\": unknown kind; did you mean 'ops'?"),
        ("3", 'recompute=3: write "none", "ops", "full" or { budget = "20 GB" }'),
        ('{ bugdet = "2 GB" }', "recompute: bugdet is no key of it"),
        ('{ budget = "2 XB" }', "recompute: budget='2 XB' is no size in bytes; write it as \"20 GB\""),
        ('{ budget = "0 GB" }', "is no size in bytes"),
        ("{ budget = 20 }", "budget='20' is no size in bytes"),
        ("{}", "budget='' is no size in bytes"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(written: str, expected: str) -> None:
    with pytest.raises(Refusal) as refused:
        config_of(f"recompute={written}")
    assert expected in str(refused.value)


def test_sizes() -> None:
    assert size_in_bytes("20 GB") == 20 * 10**9 and size_in_bytes("1.5GiB") == 3 * 2**29
    assert size_in_bytes("80 KiB") == 80 * 2**10 and size_in_bytes("7 B") == 7


def test_kinds_in_words() -> None:
    kinds: list[Kind] = ["full", "full", "full", "ops", "ops", "none"]
    assert in_words(kinds) == "layers 0-2 full, 3-4 ops, 5 none"
    assert in_words(["ops"]) == "layers 0 ops"


def test_every_layer_is_told_its_own() -> None:
    kinds: tuple[Kind, ...] = ("full", "none", "ops", "full")
    model: Any = build_model(config_of(*DEEP).model, VOCAB_SIZE)
    recompute_layers(model, kinds)
    assert tuple(block.recompute for block in model.blocks) == kinds
    recompute_layers(model, "full")
    assert {block.recompute for block in model.modules() if isinstance(block, Block)} == {"full"}


# Choosing.


@pytest.fixture(scope="module")
def every_choice() -> dict[tuple[Kind, ...], tuple[int, float]]:
    """(bytes that a rank needs, operations that are done again) of all choices."""
    config = config_of(*DEEP)
    held = States(*states(config.model, VOCAB_SIZE, "adamw"))
    return {
        kinds: (
            memory(config.model, VOCAB_SIZE, "adamw", Share(256, FP32, kinds, states=held)).total,
            repeated_flops(config.model, kinds, "cpu", (64,)),
        )
        for kinds in itertools.product(KINDS, repeat=4)
    }


@pytest.mark.parametrize("share", [-0.01, 0.0, 0.1, 0.3, 0.5, 0.61, 0.8, 0.99, 1.0, 1.2])
def test_the_choice_fits_and_repeats_no_more_than_the_best(
    every_choice: dict[tuple[Kind, ...], tuple[int, float]], share: float
) -> None:
    full, none = (every_choice[(kind,) * 4][0] for kind in ("full", "none"))
    limit = int(full + share * (none - full))
    config = config_of(*DEEP, f'recompute={{ budget = "{limit} B" }}')
    step = config.stages[0].longest_step()
    fitting = [flops for needed, flops in every_choice.values() if needed <= limit]
    assert bool(fitting) == (limit >= full), "no choice needs less than all layers at full"
    if not fitting:
        with pytest.raises(Refusal, match=r"recompute\.budget="):
            kinds_of(config, VOCAB_SIZE, step, 1, FP32)
        return
    kinds = kinds_of(config, VOCAB_SIZE, step, 1, FP32)
    needed, flops = every_choice[kinds]
    assert needed <= limit and flops == pytest.approx(min(fitting))
    assert needs_of(config, VOCAB_SIZE, step, 1, FP32).total == needed


LAYERS = st.lists(
    st.tuples(*[st.integers(1, 40)] * 3, st.integers(0, 60), *[st.integers(1, 30)] * 2), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(drawn=LAYERS, limit=st.integers(0, 250), in_flight=st.integers(1, 3), beside=st.integers(0, 40))
def test_any_layers_are_chosen_as_well_as_can_be(drawn: Any, limit: int, in_flight: int, beside: int) -> None:
    """Of layers that differ in all, with several micro-batches in flight, as on the ranks of a pipeline."""
    layers = [
        Layer(dict(zip(KINDS, sorted(kept, reverse=True), strict=True)), moment, {"none": 0, "ops": a, "full": a + b})
        for *kept, moment, a, b in drawn
    ]

    def made_of(kinds: tuple[Kind, ...]) -> Choice:
        choice = Choice()
        for layer, kind in zip(layers, kinds, strict=True):
            choice = choice.then(layer, kind)
        return choice

    def fits(kinds: tuple[Kind, ...]) -> bool:
        choice = made_of(kinds)
        return (in_flight - 1) * choice.kept + max(choice.kept + beside, choice.peak) <= limit

    fitting = [kinds for kinds in itertools.product(KINDS, repeat=len(layers)) if fits(kinds)]
    chosen = cheapest(layers, fits)
    if chosen is None:
        assert not fitting
    else:
        assert fits(chosen) and made_of(chosen).flops == min(made_of(kinds).flops for kinds in fitting)


def test_a_layer_below_the_one_that_needs_most_is_run_again_where_that_alone_helps() -> None:
    """To run the upper one again costs less and frees more, but not while it makes gradients itself."""
    lower = Layer({"none": 10, "ops": 4, "full": 4}, 20, {"none": 0, "ops": 5, "full": 9})
    upper = Layer({"none": 20, "ops": 4, "full": 4}, 100, {"none": 0, "ops": 1, "full": 9})
    peaks: dict[tuple[Kind, ...], int] = {
        kinds: Choice().then(lower, kinds[0]).then(upper, kinds[1]).peak for kinds in itertools.product(KINDS, repeat=2)
    }
    assert cheapest([lower, upper], lambda kinds: peaks[kinds] <= 105) == ("ops", "none")


def test_of_too_many_choices_those_held_on_to_still_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that needs least is never left out."""
    monkeypatch.setattr(budget, "MOST", 5)
    layers = [
        Layer({"none": 30 + n, "ops": 11, "full": 5}, 40, {"none": 0, "ops": 7 + n, "full": 20}) for n in range(9)
    ]
    assert cheapest(layers, lambda kinds: set(kinds) == {"full"}) == ("full",) * 9
    found = cheapest(layers, lambda kinds: sum(layers[n].kept[kind] for n, kind in enumerate(kinds)) <= 150)
    assert found is not None and sum(layers[n].kept[kind] for n, kind in enumerate(found)) <= 150


def test_a_budget_that_is_too_small_is_refused_with_one_that_is_not() -> None:
    with pytest.raises(Refusal) as refused:
        config = config_of('recompute={ budget = "80 KB" }')
        kinds_of(config, VOCAB_SIZE, config.stages[1].longest_step(), 1, FP32)
    said = str(refused.value)
    assert said.startswith("recompute.budget='80 KB': in context.stages.1 a rank needs")
    enough = said.partition('set recompute.budget="')[2].partition('"')[0]
    config = config_of(f'recompute={{ budget = "{enough}" }}')
    assert kinds_of(config, VOCAB_SIZE, config.stages[1].longest_step(), 1, FP32)


def test_each_rank_of_a_pipeline_chooses_for_its_own_layers() -> None:
    """As little is done again as each can do with: of no layer less."""
    pipeline = (*DEEP, "parallel.pipeline=2", "tokens_per_microbatch=128")
    config = config_of(*pipeline)
    step = config.stages[0].longest_step()
    low, high = (needs_of(config, VOCAB_SIZE, step, 2, FP32, (kind,) * 4).total for kind in ("full", "none"))
    limit = (low + high) // 2
    kinds = kinds_of(config_of(*pipeline, f'recompute={{ budget = "{limit} B" }}'), VOCAB_SIZE, step, 2, FP32)
    assert needs_of(config, VOCAB_SIZE, step, 2, FP32, kinds).total <= limit
    again = [layer for layer, kind in enumerate(kinds) if kind != "none"]
    assert min(again) < 2 <= max(again), "both ranks have too little memory for all"
    for layer in again:
        less: tuple[Kind, ...] = (*kinds[:layer], "none", *kinds[layer + 1 :])
        assert needs_of(config, VOCAB_SIZE, step, 2, FP32, less).total > limit


# In a run.


def test_what_was_chosen_is_said_and_done_where_a_stage_is_entered() -> None:
    full, none = (
        needs_of(config_of(), VOCAB_SIZE, config_of().stages[1].longest_step(), 1, FP32, (kind,) * 2).total
        for kind in ("full", "none")
    )
    config = config_of(f'recompute={{ budget = "{(full + none) // 2} B" }}')
    run = Run(config, Path("runs/none"), torch.device("cpu"), torch.float32, World())
    said = list(choose_kinds(VOCAB_SIZE, run))
    assert [line.partition(":")[0] for line in said] == [f"recompute in context.stages.{n}" for n in (0, 1)]
    model: Any = build_model(config.model, VOCAB_SIZE)
    for stage in config.stages:
        take_shape(model, run, stage)
        assert said[stage.index].endswith(in_words([block.recompute for block in model.blocks]))
        assert tuple(block.recompute for block in model.blocks) != ("none", "none")


def test_one_kind_is_said_in_a_line_and_offloading_too() -> None:
    run = Run(
        config_of("recompute=ops", "offload=true"), Path("runs/none"), torch.device("cpu"), torch.float32, World()
    )
    assert list(choose_kinds(VOCAB_SIZE, run)) == [
        "recompute: layers 0-1 ops",
        "offload: activations are anyway in host memory",
    ]


def test_a_run_trains_to_the_same_numbers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("total_tokens=2048", "context.stages.0.until_tokens=1024", "context.stages.1.until_tokens=2048")

    def losses(name: str, *overrides: str) -> list[float]:
        train.main(load_config(TINY, [f"name={name}", "evals.tasks=[]", *short, *overrides]))
        rows = (here / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows]

    assert losses("plain") == losses("again", 'recompute={ budget = "1.2 MB" }', "offload=true")
    assert "recompute in context.stages.1: layers" in capsys.readouterr().out
