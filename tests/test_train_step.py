"""One optimizer step: what plain torch makes of it, however the step is cut; and what the loop hands to each step."""

import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import train
from attention.mask import Documents, Mask
from context.step_plan import StepPlan
from data.batches import Batch, Batches
from model.initialize import first_values
from model.transformer import Transformer, build_model
from moe.balance import bias_update
from moe.router import Router
from optim.groups import Optimizer, build_optimizer
from parallel.apply import parallelize
from parallel.mesh import build_mesh
from parallel.whole import fill
from parallel.world import World
from run import record
from run.config import load_config
from run.demand import demand_of
from run.microbatches import first_rows
from run.start import Run

TINY = Path(__file__).parent / "tiny.toml"
CLEAR = ("tokens_per_step=1024", "optimizer.clip=1e9", "model.initial_std=0.2", "model.num_dense_layers=0")
"""16 rows; gradients as they are, of weights so large that every part shows, in two MoE layers."""

ALONE = World()
BATCH = "{kind = 'loss', coefficient = 1.0}"
ALL_SCOPES = f"[{BATCH}, {{kind = 'loss', scope = 'sequence', coefficient = 1.0}}, " + (
    "{kind = 'loss', scope = 'microbatch', tokens = 384, coefficient = 1.0}, {kind = 'bias'}]"
)


def write_words(folder: Path) -> None:
    words = random.Random(1)
    text = " ".join("".join(words.choice("abcdef") for _ in range(words.randint(2, 6))) for _ in range(4000))
    (folder / "words.txt").write_text(text)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_words(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "write_report", lambda folder: folder)


def ready(*overrides: str, world: World = ALONE) -> tuple[StepPlan, Run, Transformer, Optimizer, list[Batch]]:
    """What the loop has in hand when it takes its first step."""
    config, device = load_config(TINY, list(overrides)), torch.device("cpu")
    mesh = build_mesh(config.parallel, config.all_row_ranks, world, device)
    run = Run(config, Path("runs/none"), device, torch.float32, world, mesh=mesh)
    batches = Batches(config.data, seed=0, rank=world.rank, world_size=world.size)
    model = build_model(config.model, batches.tokenizer.vocab_size)
    run.layouts = parallelize(model, mesh, config, device)
    fill(model, device, mesh, run.layouts, lambda name, shape: first_values(name, shape, config.model, 0))
    step = config.stages.step(0)
    model.use_rotary(step.stage.rotary)
    return step, run, model, build_optimizer(model, config.optimizer), train.take_step(batches, step, run)


def with_padding(batch: Batch) -> Batch:
    """Calls the ends of some rows padding, the same ones however the step is cut."""
    places_T = torch.arange(batch.tokens_BT.shape[1])
    is_real_BT = places_T < len(places_T) - 7 * (batch.rows_B % 3)[:, None]
    labels_BT = batch.labels_BT.where(is_real_BT, -100)
    num_targets, num_real = int((labels_BT >= 0).sum()), int(is_real_BT.sum())
    return replace(batch, is_real_BT=is_real_BT, labels_BT=labels_BT, num_targets=num_targets, num_real=num_real)


def take_step(*overrides: str, edit: Callable[[Batch], Batch] = with_padding) -> tuple[Transformer, train.StepReport]:
    """A step that leaves gradients and biases behind, and the weights as they were."""
    model, report, _ = step_of_rank(ALONE, *overrides, edit=edit)
    return model, report


def step_of_rank(
    world: World, *overrides: str, edit: Callable[[Batch], Batch] = with_padding
) -> tuple[Transformer, train.StepReport, Run]:
    step, run, model, optimizer, microbatches = ready(*CLEAR, *overrides, world=world)
    optimizer.step = lambda: None  # type: ignore[method-assign]
    return model, train.train_step(model, optimizer, [edit(batch) for batch in microbatches], step, run), run


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        error = (gradient - theirs[name]).norm() / theirs[name].norm()
        assert error <= tolerance, (name, float(error))


def routers(model: Transformer) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


# Against plain torch.


def plain_objective(model: Transformer, microbatches: list[Batch]) -> tuple[Tensor, float]:
    """Weighted losses over the number of targets, and the batch-scope balance loss of all real tokens in one piece."""
    num_targets = sum(int((batch.labels_BT >= 0).sum()) for batch in microbatches)
    objective, nats, layers = torch.zeros(()), 0.0, []
    for batch in microbatches:
        hidden_BTD, stats = model(batch.tokens_BT, batch.positions_BT, Mask(documents=Documents(batch.lengths)))
        logits_NV = (hidden_BTD @ model.head_weight.T).flatten(0, 1)
        losses_N = F.cross_entropy(logits_NV, batch.labels_BT.flatten(), reduction="none", ignore_index=-100)
        objective = objective + (losses_N * batch.weights_BT.flatten()).sum() / num_targets
        nats += float(losses_N.detach().sum())
        layers.append([layer.logits_NE[batch.is_real_BT.flatten()] for layer in stats])
    for parts in zip(*layers, strict=True):
        logits_NE = torch.cat(parts)
        wanted_NE = F.one_hot(logits_NE.topk(2).indices, 4).sum(1).float()
        balance = 4 * (wanted_NE.mean(0) / 2 * logits_NE.softmax(1).mean(0)).sum()
        objective = objective + (0.5 * balance + 0.1 * logits_NE.logsumexp(1).square().mean()) / len(layers[0])
    return objective, nats / num_targets


def test_gradients_and_loss_are_those_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = "model.moe.balance={kind = 'loss', coefficient = 0.5}"
    softmax = "model.moe.router={kind = 'softmax'}"
    cut = ("tokens_per_microbatch=512", "model.moe.z_loss=0.1")
    growing = "model.attention.temperature={kind = 'log', length = 2}"  # with a token's place in its document
    step, run, model, optimizer, microbatches = ready(loss, softmax, growing, *cut, *CLEAR)
    microbatches = [with_padding(batch) for batch in microbatches]
    assert len(microbatches) == 2 and microbatches[0].num_targets != microbatches[1].num_targets
    monkeypatch.setattr(optimizer, "step", lambda: None)
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # of an earlier step: must not be added to
    report = train.train_step(model, optimizer, microbatches, step, run)
    ours = gradients(model)
    model.zero_grad()
    objective, nats = plain_objective(model, microbatches)
    objective.backward()
    assert_same(ours, gradients(model), tolerance=2e-5)
    norm = torch.stack([gradient.norm() for gradient in gradients(model).values()]).norm()
    assert float(report.gradient_norm) == pytest.approx(float(norm), rel=1e-4)
    assert float(report.loss) == pytest.approx(nats, rel=1e-5)


def test_gradients_are_clipped_and_the_norm_told_is_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    step, run, model, optimizer, microbatches = ready("optimizer.clip=1e-3")
    monkeypatch.setattr(optimizer, "step", lambda: None)
    report = train.train_step(model, optimizer, microbatches, step, run)
    norm = torch.stack([gradient.norm() for gradient in gradients(model).values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3) and float(report.gradient_norm) > 0.01


# Whatever the cut.


@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize("tokens", [1024, 512, 256])
@pytest.mark.parametrize("balance", [BATCH, ALL_SCOPES], ids=["batch", "all scopes"])
def test_micro_batches_and_recompute_change_nothing(balance: str, tokens: int, recompute: str) -> None:
    whole, expected = take_step(f"model.moe.balance={balance}", "tokens_per_microbatch=1024")
    cut = (f"tokens_per_microbatch={tokens}", f"recompute={recompute}")
    model, report = take_step(f"model.moe.balance={balance}", *cut)
    assert len(report.microbatches) == 1024 // tokens
    assert_same(gradients(model), gradients(whole))
    assert report.routing.report() == pytest.approx(expected.routing.report(), rel=1e-5)
    for ours, theirs in zip(routers(model), routers(whole), strict=True):
        assert (ours.bias_E is None) == (theirs.bias_E is None) == (balance == BATCH)
        assert ours.bias_E is None or torch.equal(ours.bias_E, theirs.bias_E)


def test_the_loss_of_the_targets_has_no_part_in_the_balance() -> None:
    """Token weights and the number of targets divide and weigh the main loss alone; the two gradients add up."""

    def weighted(factor: float) -> Callable[[Batch], Batch]:
        def edit(batch: Batch) -> Batch:
            weights_BT = factor * (1 + torch.arange(64) % 5) * (batch.rows_B[:, None] + 1)
            labels_BT = batch.labels_BT.where(torch.arange(64) % 3 > 0, -100)
            return with_padding(replace(batch, weights_BT=weights_BT, labels_BT=labels_BT))

        return edit

    on, off = f"model.moe.balance={ALL_SCOPES}", "model.moe.balance=[]"
    alone = gradients(take_step(on, edit=weighted(0.0))[0])
    both, main = (gradients(take_step(balance, edit=weighted(1.0))[0]) for balance in (on, off))
    for name in alone:
        if "router" in name:
            assert alone[name].norm() > 1e-3
            torch.testing.assert_close(both[name] - main[name], alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", [("tokens_per_microbatch=1024",), ("tokens_per_microbatch=128", "recompute=true")])
def test_the_bias_moves_once_a_step_by_each_real_token_once(cut: tuple[str, ...]) -> None:
    model, report = take_step("model.moe.balance={kind = 'bias', rule = 'proportional', step = 1e-2}", *cut)
    counts_LE = report.routing.counts_LE
    assert counts_LE is not None
    num_real = sum(batch.num_real for batch in report.microbatches)
    assert counts_LE.sum(dim=1).tolist() == [2 * num_real] * 2 and num_real < 1024
    for router, counts_E in zip(routers(model), counts_LE, strict=True):
        assert router.bias_E is not None and router.bias_E.abs().max() > 0
        torch.testing.assert_close(router.bias_E, bias_update(torch.zeros(4), counts_E, 1e-2, "proportional"))


def test_a_second_pass_only_where_a_group_spans_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[bool] = []
    whole = train.forward

    def watched(*arguments: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        return whole(*arguments)

    monkeypatch.setattr(train, "forward", watched)
    sequence = "{kind = 'loss', scope = 'sequence'}"
    for balance, tokens, counted in (
        (BATCH, 256, 3),
        (BATCH, 1024, 0),
        (sequence, 256, 0),
        ("{kind = 'bias'}", 256, 0),
    ):
        passes.clear()
        take_step(f"model.moe.balance={balance}", f"tokens_per_microbatch={tokens}")
        assert passes == [False] * counted + [True] * (1024 // tokens), balance
    passes.clear()
    take_step("tokens_per_microbatch=256", "model.num_dense_layers=2", f"model.moe.balance={BATCH}")
    assert passes == [True] * 4


def case_data_ranks() -> None:
    world = a_world_in_a_folder()
    for balance in (BATCH, ALL_SCOPES):
        whole = take_step(f"model.moe.balance={balance}", "tokens_per_microbatch=1024")
        cuts = [f"tokens_per_microbatch={512 // parts}" for parts in (1, 2, 4)]
        steps = [step_of_rank(world, f"model.moe.balance={balance}", cut, "recompute=true") for cut in cuts]
        for step in steps:
            check_rank(step, whole)


def case_expert_ranks() -> None:
    world = a_world_in_a_folder()
    balance = f"model.moe.balance={ALL_SCOPES}"
    step = step_of_rank(world, balance, "tokens_per_microbatch=128", f"parallel.expert={world.size}")
    check_rank(step, take_step(balance, "tokens_per_microbatch=1024"))


def a_world_in_a_folder() -> World:
    folder = Path(tempfile.mkdtemp(dir="."))
    write_words(folder)
    os.chdir(folder)
    return World(dist.get_rank(), dist.get_world_size())


def check_rank(ours: tuple[Transformer, train.StepReport, Run], theirs: tuple[Transformer, train.StepReport]) -> None:
    """This rank has the gradients, the biases and the sums of one rank with all tokens."""
    (model, report, run), (whole, expected) = ours, theirs
    grid, rank = run.mesh.grid, run.world.rank
    wanted = {name: run.layouts[name].take(gradient, grid, rank) for name, gradient in gradients(whole).items()}
    assert_same(gradients(model), wanted)
    numbers, theirs_numbers = (vars(step.routing) for step in (report, expected))
    assert torch.equal(numbers["counts_LE"], theirs_numbers["counts_LE"])
    for name in ("sums_LE", "sums_L4"):
        torch.testing.assert_close(numbers[name], theirs_numbers[name])
    assert numbers["largest_W"].max() == pytest.approx(float(theirs_numbers["largest_W"]))
    for router, other in zip(routers(model), routers(whole), strict=True):
        assert router.bias_E is None or torch.equal(router.bias_E, other.bias_E)


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(outcomes: dict[int, dict[str, str]], case: str) -> None:
    assert outcomes[2].get(case, "it never ran") == ""


# What is told of choices.


def test_the_choices_looked_at_again_are_those_of_the_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights as they were nothing changes; after a step that is far too large, much."""
    _, report = take_step("tokens_per_microbatch=128", f"model.moe.balance={BATCH}")
    assert report.routing.report()["choice_overlap"] == 1.0
    overlaps = []
    for tokens in (256, 1024):
        step, run, model, optimizer, microbatches = ready(*CLEAR, f"tokens_per_microbatch={tokens}")
        optimizer.set_learning_rate(1.0)
        with torch.no_grad():
            few = first_rows(microbatches[0], 4)
            before = [stats.selected_NK for stats in train.forward(model, few, run)[1]]
        report = train.train_step(model, optimizer, microbatches, step, run)
        with torch.no_grad():
            after = [stats.selected_NK for stats in train.forward(model, few, run)[1]]
        kept = [(a[:, :, None] == b[:, None]).sum() / a.numel() for a, b in zip(before, after, strict=True)]
        overlaps.append(report.routing.report()["choice_overlap"])
        assert overlaps[-1] == pytest.approx(float(sum(kept)) / 2) and overlaps[-1] < 0.9
    assert overlaps[0] == pytest.approx(overlaps[1], abs=0.02)


def test_nothing_is_looked_at_again_in_a_dense_model_or_a_step_of_one_row() -> None:
    assert take_step("model.num_dense_layers=2")[1].routing.report() == {}
    one_row = ("tokens_per_step=128", "tokens_per_microbatch=128", "context.stages.0.sequence_length=128")
    assert "choice_overlap" not in take_step(*one_row, edit=lambda batch: batch)[1].routing.report()


def test_first_rows_are_a_whole_micro_batch() -> None:
    *_, microbatches = ready("tokens_per_microbatch=512")
    batch = with_padding(microbatches[0])
    few = first_rows(batch, 3)
    assert torch.equal(few.tokens_BT, batch.tokens_BT[:3]) and few.num_tokens == 192 == sum(few.lengths)
    assert few.lengths == batch.lengths[: len(few.lengths)]
    assert few.num_real == int(batch.is_real_BT[:3].sum()) and few.num_targets == int((few.labels_BT >= 0).sum())
    assert vars(first_rows(batch, 100)).keys() == vars(batch).keys()
    assert first_rows(batch, 100).lengths == batch.lengths


def test_every_step_gets_its_own_samples_rotation_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE, length and learning rate change exactly at the boundary; no sample of a stage is skipped or seen twice."""
    seen: list[tuple[str, float, Tensor]] = []
    whole = train.train_step

    def watched(model: Transformer, optimizer: Optimizer, microbatches: list[Batch], *rest: Any) -> Any:
        assert model.rotary is not None
        tokens = torch.cat([batch.tokens_BT for batch in microbatches])
        seen.append((model.rotary.spec.kind, optimizer.param_groups[0]["lr"], tokens))
        return whole(model, optimizer, microbatches, *rest)

    monkeypatch.setattr(train, "train_step", watched)
    config = load_config(TINY, [])
    train.main(config)
    assert [kind for kind, _, _ in seen] == ["default"] * 8 + ["yarn"] * 4
    assert [rate for _, rate, _ in seen[:8]] == [3e-3] * 8
    assert seen[8][1] == pytest.approx(1e-3) and seen[11][1] == pytest.approx(1e-4)
    batches = Batches(config.data, seed=config.seed)
    for index, (length, steps) in enumerate([(64, seen[:8]), (128, seen[8:])]):
        samples = 512 // length
        demand = demand_of(config.stages[index].step(0), batches)
        expected = batches.take(demand, 0, samples * len(steps), samples * len(steps))[0].tokens_BT
        assert torch.equal(torch.cat([tokens for _, _, tokens in steps]), expected)
