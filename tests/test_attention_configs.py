"""Every way to attend that has a configuration trains: some steps through the loop, and its loss falls."""

import json
from pathlib import Path

import pytest
import torch

import train
from model.initialize import initialize
from model.loss import cross_entropy
from model.transformer import build_model
from run.config import load_config

FOLDER = Path(__file__).parents[1] / "configs" / "attention"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.toml"))
STEPS = 20
# Less data and fewer tokens than in the file; what the file is about stays.
SMALL = (
    "total_tokens=10240",
    "tokens_per_step=512",
    "device=cpu",
    "precision=fp32",
    "threads=1",
    "model.num_layers=4",
    "model.width=32",
    "model.feed_forward_width=64",
    "context.stages.0.until_tokens=7680",
    "context.stages.1.until_tokens=10240",
    "data.sources.python={kind = 'text', path = 'words.txt', held_out = 0.1, weight = 0.5}",
    "optimizer.schedule.warmup_tokens=1024",
    "evals.every_tokens=10240",
    "evals.held_out.tokens=512",
    "evals.needle.samples=2",
    "evals.needle.one_haystack=true",  # through the caches of each attention
    "log={every_steps = 10, tensorboard = false}",
)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains(name: str, here: Path) -> None:
    train.main(load_config(FOLDER / f"{name}.toml", list(SMALL)))
    run = here / "runs" / name
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS // 10 and losses[-1] < 4.2, "an untrained model begins at log(257) = 5.5"
    cells = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    needles = [cell for cell in cells if cell["task"] == "needle"]
    assert {(cell["length"], cell["needles"]) for cell in needles} == {(128, 5), (256, 5)}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_learns(name: str) -> None:
    config = load_config(FOLDER / f"{name}.toml", list(SMALL))
    model = build_model(config.model, 61)
    initialize(model, 0, "cpu")
    model.use_rotary(config.context.stages[1].rotary)
    tokens_BT = torch.randint(61, (2, 80), generator=torch.Generator().manual_seed(0))
    hidden_BTD, _ = model(tokens_BT)
    cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, tokens_BT.flatten(), None, chunk=160).weighted.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


def test_every_way_to_attend_has_a_configuration() -> None:
    models = [load_config(FOLDER / f"{name}.toml", []).model for name in CONFIGS]
    attentions = [model.attention for model in models]
    grouped = [attention for attention in attentions if attention.kind == "grouped"]
    latent = [attention for attention in attentions if attention.kind == "latent"]
    assert {kind for model in models for kind in model.pattern} >= {"full", "window", "full_nope"}
    assert any(attention.sink for attention in grouped) and any(attention.softcap for attention in grouped)
    assert {attention.temperature.kind for attention in grouped if attention.temperature} == {"steps", "log"}
    assert {attention.query_rank is None for attention in latent} == {True, False}
