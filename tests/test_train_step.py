"""One optimizer step against plain torch, and what the loop hands to each step."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import train
from context.stages import Stages
from data.batches import Batches
from model.initialize import initialize
from model.transformer import Transformer, build_model
from moe.balance import bias_update, load_balance_loss, router_z_loss
from moe.router import Router
from optim.groups import Optimizer, build_optimizer
from parallel.replicate import World
from run import record
from run.config import RunConfig, load_config
from run.start import Run

TINY = Path(__file__).parent / "tiny.toml"
LOSS = "model.moe.balance={kind = 'loss', coefficient = 0.5}"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = random.Random(1)
    text = " ".join("".join(words.choice("abcdef") for _ in range(words.randint(2, 6))) for _ in range(4000))
    (tmp_path / "words.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "write_report", lambda folder: folder)


def ready(*overrides: str) -> tuple[RunConfig, Run, Transformer, Optimizer, list[Any]]:
    config = load_config(TINY, list(overrides))
    run = Run(config, Path("runs/none"), torch.device("cpu"), torch.float32, World())
    batches = Batches(config.data, seed=0)
    model = build_model(config.model, batches.tokenizer.vocab_size)
    initialize(model, 0, run.device)
    stage = Stages(config.context.stages, config.tokens_per_step).at(0)
    model.use_rotary(stage.rotary)
    return config, run, model, build_optimizer(model, config.optimizer), train.take_step(batches, stage, 0, config)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_and_loss_are_those_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted sum over all targets, divided by how many there are, plus each micro-batch's share of the balance."""
    config, run, model, optimizer, microbatches = ready(LOSS, "model.moe.z_loss=0.1", "optimizer.clip=1e9")
    assert len(microbatches) == 2 and microbatches[0].num_targets != microbatches[1].num_targets
    monkeypatch.setattr(optimizer, "step", lambda: None)
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # of an earlier step: must not be added to
    report = train.train_step(model, optimizer, microbatches, config, run)
    ours = gradients(model)

    model.zero_grad()
    targets = sum(int((batch.labels_BT >= 0).sum()) for batch in microbatches)
    objective, nats = torch.zeros(()), 0.0
    for batch in microbatches:
        hidden_BTD, stats = model(batch.tokens_BT, batch.positions_BT, train.Documents(batch.lengths))
        logits_NV = (hidden_BTD @ model.head_weight.T).flatten(0, 1)
        losses_N = F.cross_entropy(logits_NV, batch.labels_BT.flatten(), reduction="none", ignore_index=-100)
        objective = objective + (losses_N * batch.weights_BT.flatten()).sum() / targets
        balance = sum(0.5 * load_balance_loss(s) + 0.1 * router_z_loss(s) for s in stats) / len(stats)
        objective = objective + balance * batch.tokens_BT.numel() / config.tokens_per_step
        nats += float(losses_N.detach().sum())
    objective.backward()
    theirs = gradients(model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-4, atol=1e-7, msg=name)
    norm = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    assert float(report.gradient_norm) == pytest.approx(float(norm), rel=1e-4)
    assert float(report.loss) == pytest.approx(nats / targets, rel=1e-5)


def test_gradients_are_clipped_and_the_norm_told_is_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    config, run, model, optimizer, microbatches = ready("optimizer.clip=1e-3")
    monkeypatch.setattr(optimizer, "step", lambda: None)
    report = train.train_step(model, optimizer, microbatches, config, run)
    norm = torch.stack([gradient.norm() for gradient in gradients(model).values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3) and float(report.gradient_norm) > 0.01


def test_the_bias_moves_once_a_step_by_the_whole_steps_counts() -> None:
    config, run, model, optimizer, microbatches = ready()
    report = train.train_step(model, optimizer, microbatches, config, run)
    counts_LE = report.routing.counts_LE
    assert counts_LE is not None and int(counts_LE[0].sum()) == config.tokens_per_step * 2
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, counts_E in zip(routers, counts_LE, strict=True):
        assert router.bias_E is not None and router.bias_E.abs().max() > 0
        torch.testing.assert_close(router.bias_E, bias_update(torch.zeros(4), counts_E, 1e-2))


def test_every_step_gets_its_own_samples_rotation_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE, length and learning rate change exactly at the boundary; no sample of a stage is skipped or seen twice."""
    seen: list[tuple[str, float, torch.Tensor]] = []
    whole = train.train_step

    def watched(model: Transformer, optimizer: Optimizer, microbatches: list[Any], *rest: Any) -> Any:
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
        mixture = config.context.stages[index].mixture
        expected = batches.take(index, length, mixture, 0, samples * len(steps), samples * len(steps))[0].tokens_BT
        assert torch.equal(torch.cat([tokens for _, _, tokens in steps]), expected)
