"""Ranks that hold rows together give the numbers of one rank that holds them whole: losses, gradients, routing, steps.

The cases run on 2 and 4 gloo ranks (tests/ranks.py); each rank also computes the whole of it by itself.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import train
from attention.attention import Attention
from context.local_comm import LocalComm
from context.ulysses import Ulysses
from data.batches import Batch
from model.initialize import first_values
from model.transformer import Transformer, build_model
from moe.layer import MoE
from moe.router import Router
from parallel.mesh import Grid, Mesh, ParallelSettings, SequenceSettings, build_mesh
from parallel.sequence import RowGroup, build_row_groups, check_context, farthest_view, split_attention
from parallel.world import World
from run.config import load_config, rows_of_step
from run.microbatches import split
from run.record import StepReport
from settings import Refusal
from tests.parallel.setting import CPU, TINY, Setting, assert_close, this_world

ALONE = World()
LOSSES = "[{kind = 'loss', coefficient = 1.0}, {kind = 'loss', scope = 'sequence', coefficient = 1.0}, " + (
    "{kind = 'loss', scope = 'microbatch', tokens = 384, coefficient = 1.0}, {kind = 'bias', step = 1e-2}]"
)
MODEL = (
    "tokens_per_step=512",
    "tokens_per_microbatch=128",
    "context.stages.0.sequence_length=128",
    "model.initial_std=0.2",
    "model.num_dense_layers=0",
    "model.attention={num_heads = 4, num_kv_heads = 2, window = 24}",
    "model.pattern=['full', 'window']",
    f"model.moe.balance={LOSSES}",
    "model.moe.z_loss=0.1",
    "model.moe.router.jitter=0.1",
    "optimizer.clip=1e9",
)
"""4 rows of 128 tokens in as many micro-batches; weights so large that all shows, and draws that depend on places."""
TOLERANCE = 1e-5
LAYOUTS = ("balanced", "zigzag", "contiguous")
METHODS = ("ring", "gather", "groupcast", "ulysses", "usp")


def contexts() -> Iterator[int]:
    """The sizes of groups that the ranks divide into."""
    return (size for size in (2, 4) if dist.get_world_size() % size == 0)


def with_documents(batch: Batch) -> Batch:
    """The rows cut into documents of every length, the last one of some rows padding: the same wherever they lie."""
    lengths, starts = [], []
    for row in batch.rows_B.tolist():
        draws, done = random.Random(row), 0
        while done < batch.sequence_length:
            length = min(draws.choice([1, 2, 7, 33, 70, 128]), batch.sequence_length - done)
            lengths.append(length)
            starts += [done] * length
            done += length
    positions_BT = batch.places_BT - torch.tensor(starts).view_as(batch.places_BT)
    is_real_BT = batch.places_BT < batch.sequence_length - 7 * (batch.rows_B % 3)[:, None]
    is_last_BT = positions_BT.roll(-1, 1) == 0
    labels_BT = batch.labels_BT.where(is_real_BT & ~is_last_BT, -100)
    return replace(
        batch,
        lengths=tuple(lengths),
        positions_BT=positions_BT,
        is_real_BT=is_real_BT,
        labels_BT=labels_BT,
        num_targets=int((labels_BT >= 0).sum()),
        num_real=int(is_real_BT.sum()),
    )


class OwnRows(Setting):
    """Rows as the sources give them; first values as they are drawn."""

    def __init__(self, world: World, *overrides: str) -> None:
        super().__init__(world, *MODEL, *overrides)

    def first_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        return first_values(name, shape, self.config.model, seed)


class Training(OwnRows):
    """Rows cut into documents of every length."""

    def microbatches(self, number: int) -> list[Batch]:
        whole = train.take_step(self.batches, self.plan(number), self.run)
        return split([with_documents(batch) for batch in whole], self.plan(number), self.run)


def routers(model: Transformer) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def cloned(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: gradient.clone() for name, gradient in gradients.items()}


def record_of(training: Training, steps: int) -> list[tuple[StepReport, dict[str, float], dict[str, Tensor]]]:
    """What each of the first steps says of itself, and the gradients it leaves."""
    recorded = []
    for number in range(steps):
        report = training.step(number)
        recorded.append((report, report.routing.report(), cloned(training.gradients())))
    return recorded


@cache
def whole_steps(*overrides: str) -> list[tuple[StepReport, dict[str, float], dict[str, Tensor]]]:
    return record_of(Training(ALONE, *overrides), 3)


def check_steps(title: str, training: Training, expected: list) -> None:
    """Losses, norms, gradients, counts and all that is told of routing are those of one rank, at each step."""
    for number, (report, numbers, gradients) in enumerate(expected):
        where = f"{title}, step {number}"
        ours = training.step(number)
        assert_close(f"{where}: loss", ours.loss, report.loss, TOLERANCE)
        assert_close(f"{where}: norm", ours.gradient_norm, report.gradient_norm, TOLERANCE)
        for name, gradient in training.gradients().items():
            layout, mesh = training.run.layouts[name], training.run.mesh
            expected_part = layout.take(gradients[name], mesh.grid, mesh.world.rank)
            assert_close(f"{where}: {name}", gradient, expected_part, TOLERANCE)
        our_numbers = ours.routing.report()
        assert our_numbers.keys() == numbers.keys()
        others = {"choice_overlap"} if training.run.groups.size > 1 else set()  # which tells of this group's rows
        for name in numbers.keys() - others:
            assert_close(f"{where}: {name}", our_numbers[name], numbers[name], TOLERANCE)
        counts_LE, their_counts_LE = ours.routing.counts_LE, report.routing.counts_LE
        assert counts_LE is not None and their_counts_LE is not None and torch.equal(counts_LE, their_counts_LE)


def case_three_steps_by_each_method() -> None:
    for method in METHODS:
        sequence = f"{{full = '{method}', window = '{method}'}}"
        parallel = f"parallel={{context = {dist.get_world_size()}, sequence = {sequence}}}"
        check_steps(parallel, Training(this_world(), parallel), whole_steps())


def case_three_steps_in_each_layout() -> None:
    for context in contexts():
        for layout in LAYOUTS:
            sequence = f"{{full = 'ring', window = 'gather', layout = '{layout}', chunks_per_rank = 4}}"
            parallel = f"parallel={{context = {context}, sequence = {sequence}}}"
            training = Training(this_world(), parallel, "recompute=true")
            check_steps(parallel, training, whole_steps())


def case_three_steps_of_rows_that_do_not_divide() -> None:
    lengths = ("context.stages.0.sequence_length=102", "context.stages.1.sequence_length=102")
    rows = (*lengths, "tokens_per_step=408", "tokens_per_microbatch=204")
    balance = f"model.moe.balance={LOSSES.replace('384', '306')}"
    for context in contexts():
        training = Training(this_world(), *rows, balance, f"parallel.context={context}")
        check_steps(f"padded, context {context}", training, whole_steps(*rows, balance))


def case_three_steps_with_experts_shared_too() -> None:
    for context in contexts():
        for expert in contexts():
            parallel = f"parallel={{context = {context}, expert = {expert}}}"
            training = Training(this_world(), parallel, "recompute=true")
            layers = [module for module in training.model.modules() if isinstance(module, MoE)]
            assert all(len(layer.experts.down) == 4 // expert for layer in layers)
            check_steps(parallel, training, whole_steps())


def case_three_steps_of_other_kinds_of_attention() -> None:
    """Latent attention, which sends its latent, and a learned sink with queries that grow."""
    heads = "num_heads = 4, window = 24"
    latent = "kind = 'latent', latent_rank = 6, nope_channels = 4, rope_channels = 4, value_channels = 3"
    grouped = "num_kv_heads = 2, sink = true, temperature = {kind = 'log', length = 4}"
    for attention in (latent, grouped):
        kind = (f"model.attention={{{heads}, {attention}}}", "model.pattern=['full_nope', 'window']")
        for context in contexts():
            parallel = f"parallel={{context = {context}, sequence = {{full = 'usp', window = 'ring', ulysses = 2}}}}"
            check_steps(f"{attention}, {parallel}", Training(this_world(), *kind, parallel), whole_steps(*kind))


def case_three_steps_of_what_a_stage_may_ask_of_its_rows() -> None:
    """Positions that skip, and rows that are seen whole, also where they do not divide."""
    skips, whole = "context.stages.0.positions={kind = 'pose', reach = 400}", "context.stages.0.has_document_mask=false"
    rows = ("context.stages.0.mixture={needles = 1.0}", "data.sources.needles.fractions=[0.5]")
    lengths = ("context.stages.0.sequence_length=102", "context.stages.1.sequence_length=102")
    padded = (*lengths, "tokens_per_step=408", "tokens_per_microbatch=204", "model.moe.balance=[]")
    plain = record_of(OwnRows(ALONE, *rows), 1)[0][0]
    for asked in ((*rows, skips), (*rows, whole), (*rows, skips, whole, *padded)):
        expected = record_of(OwnRows(ALONE, *asked), 3)
        assert abs(float(expected[0][0].loss - plain.loss)) > 1e-4
        for context in contexts():
            ours = OwnRows(this_world(), *asked, f"parallel.context={context}")
            check_steps(f"{asked}, context {context}", ours, expected)


def case_three_steps_of_a_stage_that_grows() -> None:
    """The window that training sees narrows tiles too, and lengths change from step to step."""
    for growth in ("{kind = 'window', start = 8, rate = 20.0}", "{kind = 'power_of_two', shortest = 64, cycles = 1}"):
        grows = (f"context.stages.0.growth={growth}", "model.moe.balance={kind = 'loss'}")
        expected = record_of(OwnRows(ALONE, *grows), 3)
        for context in contexts():
            parallel = f"parallel={{context = {context}, sequence = {{full = 'ring', window = 'gather'}}}}"
            check_steps(f"{growth}, {parallel}", OwnRows(this_world(), *grows, parallel), expected)


def case_three_steps_of_layers_that_rotate_each_in_their_own_way() -> None:
    """Full layers by a scaled rotation, window layers by another one, and layers by none."""
    layers = ("model.num_layers=3", "model.pattern=['full', 'window', 'full_nope']")
    full = "{kind = 'yarn', base = 1e4, factor = 4.0, original_length = 32}"
    mapped = (*layers, f"context.stages.0.rotary={{full = {full}, window = {{kind = 'default', base = 100.0}}}}")
    everywhere = record_of(Training(ALONE, *layers, f"context.stages.0.rotary={full}"), 1)[0][0]
    assert abs(float(whole_steps(*mapped)[0][0].loss - everywhere.loss)) > 1e-4
    for context in contexts():
        parallel = f"parallel={{context = {context}, sequence = {{full = 'ring', window = 'groupcast'}}}}"
        check_steps(f"rotations, {parallel}", Training(this_world(), *mapped, parallel), whole_steps(*mapped))


def case_a_rank_with_other_documents_is_found_out() -> None:
    """Every rank says so, and none waits."""
    training = Training(this_world(), f"parallel.context={dist.get_world_size()}")
    whole = [with_documents(batch) for batch in train.take_step(training.batches, training.plan(0), training.run)]
    if training.run.world.rank == 1:
        first = whole[-1].lengths
        whole[-1] = replace(whole[-1], lengths=(*first[:-2], first[-2] + first[-1]))
    with pytest.raises(Refusal, match="disagree on the documents and tokens of a step: ranks 1 have"):
        split(whole, training.plan(0), training.run)
    dist.barrier()


def case_choices_looked_at_again_are_of_the_first_rows() -> None:
    """With the weights as they were nothing changes."""
    for context in contexts():
        frozen = ("optimizer.learning_rate=1e-30", "model.moe.balance={kind = 'loss'}")
        training = Training(this_world(), f"parallel.context={context}", *frozen)
        assert training.step(0).routing.report()["choice_overlap"] == 1.0


def case_whole_rows_are_evaluated_on_each_rank_alone() -> None:
    """Also while no other rank does: nothing may be sent."""
    training, alone = Training(this_world(), f"parallel.context={dist.get_world_size()}"), Training(ALONE)
    tokens_BT = torch.arange(2 * 50).view(2, 50) % 200
    if training.run.world.is_main:
        with torch.no_grad():
            assert torch.equal(training.model(tokens_BT)[0], alone.model(tokens_BT)[0])
    dist.barrier()


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.moe.capacity={factor = 1.0}"], r"parallel.context=2 .* model.moe.capacity decides by all of it"),
        (
            ["model.moe.router={kind = 'expert_choice', at_eval = 'token_choice'}", "model.moe.balance=[]"],
            r'parallel.context=2 .* model.moe.router.kind="expert_choice" decides by all of it',
        ),
        (["parallel.sequence.full=rings"], r"parallel.sequence.full"),
        (
            ["parallel={context = 4, sequence = {full = 'ulysses'}}"],
            r'parallel.sequence.full="ulysses": .*4 ranks cannot share 2 query heads and 1 key heads; use 1 or 2 ranks',
        ),
        (
            [
                "parallel={context = 3, sequence = {window = 'ulysses'}}",
                "model.attention.window=8",
                "model.pattern=['window_nope']",
            ],
            r'parallel.sequence.window="ulysses": .*3 ranks cannot share',
        ),
        (["parallel.sequence.layout=striped"], r"parallel.sequence.layout"),
        (["parallel.sequence.chunks_per_rank=0"], r"chunks_per_rank"),
    ],
)
def test_what_cannot_lie_on_several_ranks_is_refused_by_name(overrides: list[str], expected: str) -> None:
    with pytest.raises(Refusal, match=expected):
        load_config(TINY, ["parallel.context=2", *overrides])
    if "parallel" not in overrides[0]:
        load_config(TINY, overrides)


def test_ulysses_asks_its_own_layers_for_heads_and_no_others() -> None:
    load_config(TINY, ["parallel={context = 3, sequence = {window = 'ulysses'}}"])
    load_config(TINY, ["parallel={context = 3, sequence = {full = 'usp'}}"])
    load_config(TINY, ["parallel={context = 2, sequence = {full = 'ulysses'}}"])
    latent = (
        "{kind = 'latent', num_heads = 3, latent_rank = 6, nope_channels = 4, rope_channels = 4, value_channels = 3}"
    )
    load_config(TINY, [f"model.attention={latent}", "parallel={context = 3, sequence = {full = 'ulysses'}}"])


@pytest.mark.parametrize(("context", "size", "divisor"), [(2, 1, 1), (4, 6, 3)])
def test_ranks_that_do_not_divide_into_groups_are_refused(context: int, size: int, divisor: int) -> None:
    expected = rf"parallel.context={context} does not divide the {size} ranks .* set parallel.context={divisor}"
    with pytest.raises(Refusal, match=expected):
        build_mesh(ParallelSettings(context=context), {context: "parallel.context"}, World(0, size), CPU)


def test_a_step_is_shared_out_among_groups() -> None:
    config = load_config(TINY, ["parallel.context=4", "tokens_per_microbatch=512"])
    assert rows_of_step(config, config.stages.step(0), 1) == 8
    with pytest.raises(Refusal, match=r"does not divide among 2 groups of parallel.context=4 ranks"):
        rows_of_step(config, config.stages.step(0), 2)


def test_each_layer_reaches_over_the_group_by_the_method_of_its_kind() -> None:
    pattern = ("model.pattern=['full_nope', 'window']", "model.attention.window=8")
    model = build_model(load_config(TINY, list(pattern)).model, 257)
    (comm,) = LocalComm.run(1, lambda comm: comm)
    split_attention(model, RowGroup(comm, SequenceSettings(full="usp", window="ring", ulysses=3)))
    full, window = (
        layer.attend.backend(layer.training_needs("cpu", torch.float32))
        for layer in model.modules()
        if isinstance(layer, Attention)
    )
    assert (full.name, window.name) == ("usp(sdpa)", "ring(sdpa)")
    assert isinstance(full, Ulysses) and full.at_most == 3


@pytest.mark.parametrize(("pattern", "expected"), [(["window", "window_nope"], 8), (["window", "full_nope"], None)])
def test_rows_are_laid_out_for_the_farthest_that_a_layer_sees(pattern: list[str], expected: int | None) -> None:
    model = load_config(TINY, [f"model.pattern={pattern}", "model.attention.window=8"]).model
    assert farthest_view(model) == expected


def test_a_rank_alone_keeps_its_rows() -> None:
    group = build_row_groups(SequenceSettings(), [1], Mesh(Grid(4), World(3, 4), {}))[1]
    assert group == RowGroup() and group.size == 1
    assert group.groups(World(3, 4)) == World(3, 4)
    assert group.sum(torch.ones(2)).tolist() == [1, 1]
    check_context(ParallelSettings(), load_config(TINY, ["model.moe.capacity={factor = 1.0}"]).model)
