"""A run stays the same run when a new version knows more keys, or knows an old one under another name."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoint.checkpoints import Checkpoints, CheckpointSettings
from checkpoint.identity import MAY_CHANGE, MIGRATIONS, different, read_recorded
from run.config import RunConfig, load_config
from run.folder import refuse_other_run
from settings import Refusal, Section, to_toml

WRITTEN = """
name = "old"
total_tokens = 4096
tokens_per_step = 512
threads = 1

[model]
num_layers = 2
width = 16
num_dense_layers = 1
feed_forward_width = 32
attention = { num_heads = 2, num_kv_heads = 1 }
moe = { num_experts = 4, experts_per_token = 2, expert_width = 16, router = { kind = "sigmoid" }, BALANCE }

[[context.stages]]
until_tokens = 4096
sequence_length = 64
rotary = { kind = "default", base = 10_000.0 }

[data.sources.words]
kind = "text"
path = "words.txt"

[optimizer]
kind = "adamw"
learning_rate = 3e-3
"""
"""What a person wrote."""

RECORDED = """
name = "old"
total_tokens = 4096
tokens_per_step = 512
seed = 0
device = "auto"
precision = "auto"
threads = 1
compile = false
recompute = false
loss_chunk = 4096

[model]
num_layers = 2
width = 16
feed_forward_width = 32
num_dense_layers = 1
pattern = ["full"]
tied_embeddings = false
norm_epsilon = 1e-06
initial_std = 0.02

[model.attention]
kind = "grouped"
num_heads = 2
num_kv_heads = 1
head_norms = false
backend = "auto"
norm_epsilon = 1e-06

[model.moe]
num_experts = 4
experts_per_token = 2
expert_width = 16
num_shared_experts = 0
z_loss = 0.0
experts = "auto"

[model.moe.router]
kind = "sigmoid"
normalize = true
scale = 1.0

[model.moe.balance]
BALANCE

[[context.stages]]
until_tokens = 4096
sequence_length = 64

[context.stages.rotary]
kind = "default"
base = 10000.0

[context.stages.mixture]

[context.stages.learning_rate]
kind = "continue"

[data]
pack = "best_fit"
prepared = "prepared"

[data.tokenizer]
kind = "byte"

[data.sources.words]
kind = "text"
path = "words.txt"
weight = 1.0
held_out = 0.03

[optimizer]
kind = "adamw"
learning_rate = 0.003
betas = [0.9, 0.95]
weight_decay = 0.1
epsilon = 1e-08
clip = 1.0

[optimizer.schedule]
kind = "constant"
warmup_tokens = 0

[evals]
at_stage_ends = true
seed = 0

[checkpoint]
every_steps = 500
keep = 3

[log]
every_steps = 10
tensorboard = true
"""
"""What version 0.1.0 made of it and wrote into the run's folder and its checkpoints."""

BIAS = ('{ kind = "bias", step = 1e-2 }', 'kind = "bias"\nstep = 0.01\ncoefficient = 0.0')
BOTH = (
    '[{ kind = "bias", step = 1e-2 }, { kind = "loss", coefficient = 0.02 }]',
    'kind = "bias"\nstep = 0.01\ncoefficient = 0.02',
)
LOSS = ('{ kind = "loss", coefficient = 0.05 }', 'kind = "loss"\ncoefficient = 0.05')


def written(folder: Path, balance: str = BIAS[0], *overrides: str) -> RunConfig:
    (folder / "old.toml").write_text(WRITTEN.replace("BALANCE", f"balance = {balance}"))
    return load_config(folder / "old.toml", list(overrides))


def recorded(balance: str = BIAS[1]) -> str:
    return RECORDED.replace("BALANCE", balance)


@pytest.mark.parametrize(("today", "before"), [BIAS, BOTH, LOSS], ids=["bias", "bias and loss", "loss"])
def test_a_run_that_an_older_version_recorded_is_the_same_run(tmp_path: Path, today: str, before: str) -> None:
    config = written(tmp_path, today)
    assert to_toml(config) != recorded(before), "today's version knows more keys"
    assert different(recorded(before), config) == []
    others = [other for other, _ in (BIAS, BOTH, LOSS) if other != today]
    assert all(different(recorded(before), written(tmp_path, other)) for other in others)


def test_an_older_runs_folder_continues(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(recorded())
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 512}) + "\n")
    refuse_other_run(folder, written(tmp_path))
    with pytest.raises(Refusal, match=r"another configuration:\n  model.moe.balance.1.kind: \(left out\) -> .loss"):
        refuse_other_run(folder, written(tmp_path, BOTH[0]))


def test_todays_configuration_is_read_as_it_was_written(tmp_path: Path) -> None:
    for today, _ in (BIAS, BOTH, LOSS):
        config = written(tmp_path, today)
        assert read_recorded(to_toml(config), RunConfig, "here") == config and different(to_toml(config), config) == []
    dense = written(tmp_path)
    dense = dense.model_copy(update={"model": dense.model.model_copy(update={"moe": None, "num_dense_layers": 0})})
    assert different(to_toml(dense), dense) == []
    for path in MIGRATIONS:
        place = tomllib.loads(to_toml(written(tmp_path)))
        for name in path.split("."):
            place = place[name]
        assert MIGRATIONS[path](place) == place


def test_differences_are_named_by_path(tmp_path: Path) -> None:
    now = written(tmp_path, BIAS[0], "model.attention.num_kv_heads=2", "seed=1")
    assert different(recorded(), now) == ["seed: 0 -> 1", "model.attention.num_kv_heads: 1 -> 2"]


def test_a_key_that_is_known_no_more_is_a_difference(tmp_path: Path) -> None:
    text = recorded().replace("num_shared_experts = 0", "colour = 3").replace("[log]", "[log]\nvolume = 11")
    lines = different(text, written(tmp_path))
    assert len(lines) == 2 and "model.moe.colour: unknown key (value 3)" in lines[0] and "log.volume" in lines[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = ", "not valid TOML"),
        ("", "total_tokens: is missing"),
        ("model = 3", "model=3"),
        ("[model]\nmoe = 3", "model.moe=3"),
        ("[model.moe]\nbalance = 3", "model.moe.balance"),
    ],
)
def test_what_is_no_configuration_is_refused_by_name(text: str, expected: str) -> None:
    with pytest.raises(Refusal) as refused:
        read_recorded(text, RunConfig, "there")
    assert "there: " in str(refused.value) and expected in str(refused.value)


def test_where_a_run_is_computed_and_how_it_is_watched_may_change(tmp_path: Path) -> None:
    free = (
        "name=other",
        "log.every_steps=7",
        "threads=2",
        "checkpoint.keep=9",
        "device=cpu",
        "profile.start_step=2",
        "parallel.expert=2",
        "trial=false",
        "recompute=full",
        "offload=true",
        "watchdog.seconds=60",
    )
    assert {override.partition("=")[0].partition(".")[0] for override in free} == set(MAY_CHANGE)
    assert different(recorded(), written(tmp_path, BIAS[0], *free)) == []
    assert different(recorded(), written(tmp_path, BIAS[0], "context.stages.0.context=2")) == []


class Older(Section):
    name: str = "tiny"
    rate: float = 0.1


class Newer(Older):
    added: float = 0.5


def test_a_checkpoint_of_an_older_version_is_restored(tmp_path: Path) -> None:
    def opened(config: Section) -> tuple[Checkpoints, list[str]]:
        warnings: list[str] = []
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        settings = CheckpointSettings(asynchronous=False)
        return Checkpoints(tmp_path, settings, model, [optimizer], config, warnings.append), warnings

    opened(Older())[0].save(1, {"step": 1})
    checkpoints, warnings = opened(Newer())
    assert checkpoints.restore_latest() == {"step": 1} and not warnings
    with pytest.raises(Refusal, match=r"another configuration: added: 0\.5 -> 0\.6"):
        opened(Newer(added=0.6))[0].restore_latest()
    checkpoints.save(2, {"step": 2})
    with pytest.raises(Refusal, match=r"step_00000002: .*added: unknown key \(value 0\.5\)"):
        (tmp_path / "checkpoints/step_00000001").rename(tmp_path / "older")
        opened(Older())[0].restore_latest()


def test_what_no_trained_number_depends_on_may_change_inside():
    old = WRITTEN.replace('router = { kind = "sigmoid" }, BALANCE', 'router = { kind = "expert_choice" }, balance = []')
    config = read_recorded(old, RunConfig, "config.toml")
    token_choice = old.replace('"expert_choice"', '"expert_choice", at_eval = "token_choice"')
    assert different(token_choice, config) == []
    assert different(old.replace('"expert_choice"', '"expert_choice", scale = 2.0'), config) != []
