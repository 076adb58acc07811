"""Every kind of router and balance that has a configuration trains: 50 steps through the loop, and its loss falls."""

import json
from pathlib import Path

import pytest
import torch

import train
from context.rotary import DefaultRotary
from model.block import Kind
from model.initialize import initialize
from model.transformer import build_model
from moe.router import KINDS, Router
from moe.routing import TokenFacts
from parallel.recompute import recompute_layers
from run.config import load_config

FOLDER = Path(__file__).parents[1] / "configs" / "moe"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.toml"))
STEPS = 50
# Less data, a smaller model and fewer tokens than in the file; what the file is about stays.
SMALL = (
    "total_tokens=12800",
    "tokens_per_step=256",
    "device=cpu",
    "precision=fp32",
    "threads=1",
    "model.width=32",
    "context.stages.0.until_tokens=12800",
    "data.sources.python={kind = 'text', path = 'words.txt', held_out = 0.1}",
    "optimizer.schedule.warmup_tokens=1280",
    "evals.every_tokens=12800",
    "evals.held_out.tokens=512",
    "evals.routing.tokens=512",
    "log={every_steps = 10, tensorboard = false}",
)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains(name: str, here: Path) -> None:
    cut = ["tokens_per_microbatch=128"] if name.startswith("balance") else []
    train.main(load_config(FOLDER / f"{name}.toml", [*SMALL, *cut]))
    recorded = [json.loads(line) for line in (here / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in recorded]
    assert [row["step"] for row in recorded] == [10, 20, 30, 40, STEPS]
    assert losses[-1] < 3.0, "an untrained model begins at log(257) = 5.5"
    assert (here / "runs" / name / "evals.jsonl").stat().st_size > 0


def test_every_kind_has_a_configuration() -> None:
    configs = [load_config(FOLDER / f"{name}.toml", []).model.moe for name in CONFIGS]
    settings = [moe for moe in configs if moe is not None]
    assert {moe.router.kind for moe in settings} == set(KINDS)
    assert {moe.capacity.drop for moe in settings if moe.capacity} == {"probability", "position"}
    assert {moe.null_experts.output for moe in settings if moe.null_experts} == {"zero", "copy"}
    rules = [rule for moe in settings for rule in moe.balance]
    assert {rule.scope for rule in rules if rule.kind == "loss"} == {"batch", "microbatch", "sequence"}
    assert {rule.rule for rule in rules if rule.kind == "bias"} == {"sign", "proportional"}
    assert any(moe.shared_gate for moe in settings) and any(moe.z_loss for moe in settings)


def test_every_layer_of_a_model_draws_for_itself() -> None:
    model = build_model(load_config(FOLDER / "random.toml", []).model, 61)
    layers = [module.extras.layer for module in model.modules() if isinstance(module, Router)]
    assert layers == [0, 1]


@pytest.mark.parametrize("kind", ["ops", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputation_with_a_router_that_is_never_the_same_twice(name: str, kind: Kind) -> None:
    """Non-deterministic kernels make logits differ: the rows of the second pass must still be those of the first."""
    config = load_config(FOLDER / f"{name}.toml", list(SMALL))
    model = build_model(config.model, 61)
    initialize(model, 0, "cpu")
    model.use_rotary(DefaultRotary(base=10_000.0))
    recompute_layers(model, kind)
    for module_name, module in model.named_modules():
        if module_name.endswith(".router"):
            # Not torch's own generator: a recomputation would put that back.
            noise = torch.Generator().manual_seed(1)
            module.register_forward_pre_hook(
                lambda _, args, noise=noise: (args[0] + torch.randn(args[0].shape, generator=noise), *args[1:])
            )
    torch.manual_seed(0)
    ids_BT = torch.randint(61, (2, 64))
    places_BT = torch.arange(64).expand(2, -1)
    is_real_BT = places_BT < 60
    facts = TokenFacts(ids_BT, places_BT, torch.tensor([17, 5]), is_real_BT)
    hidden_BTD, _ = model(ids_BT, facts=facts)
    hidden_BTD.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
