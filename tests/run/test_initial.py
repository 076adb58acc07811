"""A run that starts from another one computes what that one computed, takes what it says, and needs it only once."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint.manifest
import checkpoint.sealed
import train
from checkpoint.checkpoints import read_checkpoint
from data.tokenizer import ByteTokenizer
from model.initialize import initialize
from model.transformer import Transformer, build_model
from parallel.layout import whole_layouts
from run import record
from run.config import load_config
from run.initial import first_weights
from run.start import start
from settings import Refusal

ROOT = Path(__file__).parents[2]
CONFIG = """
total_tokens = 4096
tokens_per_step = 512
device = "cpu"
precision = "fp32"
threads = 1
model = { num_layers = 3, width = 16, attention = { num_heads = 2, num_kv_heads = 1 }, feed_forward_width = 32 }
optimizer = { kind = "adamw", learning_rate = 1e-2 }
data.sources.words = { kind = "text", path = "words.txt", held_out = 0.1 }
log = { every_steps = 1, tensorboard = false }
checkpoint = { every_steps = 3 }

[[context.stages]]
until_tokens = 4096
sequence_length = 64
rotary = { kind = "default", base = 10_000.0 }
"""
MOE = "model.moe={num_experts = 4, experts_per_token = 2, expert_width = WIDTH, balance = {kind = 'loss'}}"
COPY = (MOE.replace("WIDTH", "32"), "initial={checkpoint = 'runs/dense', upcycle = {kind = 'copy'}}")
SPLIT = (MOE.replace("WIDTH", "16"), "initial={checkpoint = 'runs/dense', upcycle = {kind = 'split'}}")
PLAIN = ("initial.checkpoint=runs/dense",)


def drop(share: float) -> tuple[str, str]:
    return COPY[0], f"initial={{checkpoint = 'runs/dense', upcycle = {{kind = 'drop', share = {share}}}}}"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a dense run of eight steps over it."""
    folder = tmp_path_factory.mktemp("initial")
    words = torch.randint(0, 40, (20_000,), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [" ".join(f"{word * 7919 % 1000}" for word in words[i : i + 500]) for i in range(0, len(words), 500)]
    (folder / "words.txt").write_text("\n\n".join(lines))
    (folder / "dense.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch, handlers_kept():
        patch.chdir(folder)
        patch.setattr(record, "write_report", lambda folder: folder)
        train.main(load_config("dense.toml", []))
    return folder


@pytest.fixture
def here(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that folder to work in."""
    shutil.copytree(dense, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "write_report", lambda folder: folder)
    with handlers_kept():
        yield tmp_path


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Signal handlers as they were, afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def load(*overrides: str, name: str = "new") -> Any:
    return load_config("dense.toml", [f"name={name}", *overrides])


def started(*overrides: str) -> Transformer:
    """The model of such a run before its first step."""
    run = start(load(*overrides))
    model = build_model(run.config.model, ByteTokenizer.vocab_size)
    run.layouts = whole_layouts(model)
    first_weights(run, model, ByteTokenizer())
    model.use_rotary(run.config.context.stages[0].rotary)
    return model.eval()


def dense_model() -> Transformer:
    config = load()
    model = build_model(config.model, ByteTokenizer.vocab_size)
    initialize(model, 0, "cpu")
    model.load_state_dict(read_checkpoint("runs/dense")[2])
    model.use_rotary(config.context.stages[0].rotary)
    return model.eval()


def logits(model: Transformer) -> torch.Tensor:
    tokens_BT = torch.randint(0, 257, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens_BT)[0] @ model.head_weight.T


def rows(name: str = "new") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path("runs") / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "overrides",
    [
        PLAIN,
        COPY,
        SPLIT,
        drop(0.0),
        (*COPY, "model.moe.num_shared_experts=1"),
        (*COPY, "model.num_dense_layers=1"),
        (*SPLIT, "model.num_dense_layers=2", "model.moe.router={kind = 'sigmoid', scale = 2.0}"),
        (*SPLIT, "model.moe.balance={kind = 'bias'}"),
    ],
)
def test_the_model_computes_what_the_dense_one_computed(here: Path, overrides: tuple[str, ...]) -> None:
    expected, ours = logits(dense_model()), logits(started(*overrides))
    assert ((ours - expected).norm() / expected.norm()).item() < 2e-6
    assert not torch.allclose(expected, logits(started())), "nothing was trained"


def test_what_is_forgotten_is_the_experts_alone(here: Path) -> None:
    copied, dropped, other = (
        started(*overrides).state_dict() for overrides in (COPY, drop(1.0), (*drop(1.0), "seed=1"))
    )
    different = {name for name in copied if not torch.equal(copied[name], dropped[name])}
    experts = {f"blocks.{layer}.feed_forward.experts.{part}" for layer in range(3) for part in ("gate_up", "down")}
    assert different == experts
    assert all(not torch.equal(dropped[name], other[name]) for name in experts)
    first, second = (dropped[f"blocks.{layer}.feed_forward.experts.down"] for layer in (0, 1))
    assert not torch.allclose(first / first.std(), second / second.std(), atol=0.1), "layers draw on their own"
    assert all(torch.equal(copied[name], tensor) for name, tensor in started(*drop(0.0)).state_dict().items())


def test_the_loss_goes_on_where_it_was_and_falls(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(load(*PLAIN, name="on"))
    train.main(load(*COPY, name="copied"))
    train.main(load(*SPLIT, name="split"))
    fresh, on = rows("dense")[0]["loss"], rows("on")[0]["loss"]
    assert on < fresh - 0.5
    for name in ("copied", "split"):
        assert rows(name)[0]["loss"] == pytest.approx(on, rel=1e-5)
        assert rows(name)[-1]["loss"] < on
        assert (rows(name)[0]["step"], rows(name)[0]["tokens"]) == (1, 512), "tokens are counted anew"
    said = capsys.readouterr().out
    assert "starts from runs/dense, step 8: 27 tensors as they are" in said
    assert "starts from runs/dense, step 8: 21 tensors as they are" in said
    assert "layer 2, dense there: upcycled experts.gate_up, experts.down; drawn router.weight" in said
    assert "layer 0, dense there: upcycled experts.gate_up, experts.down, router.weight; drawn -" in said


def test_a_run_that_goes_on_does_not_need_the_other_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train.main(load(*COPY, name="whole"))
    with monkeypatch.context() as broken:
        real, calls = train.train_step, iter(range(100))

        def falling(*arguments: Any) -> Any:
            if next(calls) == 4:
                raise KeyboardInterrupt
            return real(*arguments)

        broken.setattr(train, "train_step", falling)
        with pytest.raises(KeyboardInterrupt):
            train.main(load(*COPY))
    (here / "runs/dense").rename(here / "gone")
    train.main(load(*COPY))
    assert [row["loss"] for row in rows()] == [row["loss"] for row in rows("whole")]
    ours, theirs = read_checkpoint("runs/new")[2], read_checkpoint("runs/whole")[2]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(Refusal, match="runs/dense: no such folder"):
        train.main(load(*COPY, name="third"))
    assert not (here / "runs/third").exists()


def test_a_mixture_starts_from_a_mixture(here: Path) -> None:
    train.main(load(*COPY, "model.moe.balance={kind = 'bias'}"))
    model = started(COPY[0], "model.moe.balance={kind = 'bias'}", "initial.checkpoint=runs/new", "name=third")
    saved = read_checkpoint("runs/new")[2]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert any(name.endswith("router.bias_E") and tensor.any() for name, tensor in saved.items())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((COPY[0], *PLAIN), r"dense in layers 0, 1, 2, which are MoE here.*initial.upcycle = \{ kind = \"copy\" \}"),
        ((COPY[1],), "initial.upcycle: no layer is dense in runs/dense and MoE here"),
        ((*COPY, "model.moe.expert_width=16"), "expert_width=16 must be the dense feed_forward_width=32"),
        ((*SPLIT, "model.moe.expert_width=24"), "expert_width=24 must divide"),
        (
            (*PLAIN, "model.width=32"),
            r"(?s)another model.*blocks.0.attention_norm.weight: \(16,\) float32 in the checkpoint"
            r", \(32,\) float32 here.*and 1\d more",
        ),
        ((*PLAIN, "model.num_layers=2"), r"blocks.2.feed_forward.down.weight: only in the checkpoint, \(16, 32\)"),
        ((*PLAIN, "model.attention.head_norms=true"), r"blocks.0.attention.*norm.weight: not in the checkpoint"),
        ((*PLAIN, "model.tied_embeddings=true"), r"head.weight: only in the checkpoint, \(257, 16\)"),
        (
            (*PLAIN, "model.attention={num_heads = 4, num_kv_heads = 2, channels = 4}"),
            "num_heads=2, this configuration 4",
        ),
        (("initial.checkpoint=words.txt",), "words.txt: is a file"),
        (("initial.checkpoint=runs",), "runs: holds no checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(here: Path, overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(Refusal, match=expected):
        train.main(load(*overrides))
    assert not (here / "runs/new").exists()


@pytest.mark.parametrize("place", ["runs/dense", "runs/dense/checkpoints", "runs/dense/checkpoints/step_00000006"])
def test_another_vocabulary_is_refused(here: Path, place: str) -> None:
    path = here / "runs/dense/materials.json"
    materials = json.loads(path.read_text())
    started(f"initial.checkpoint={place}")
    path.write_text(json.dumps(materials | {"tokenizer": "0123"}))
    with pytest.raises(Refusal, match=f"{place}: was trained with another tokenizer"):
        started(f"initial.checkpoint={place}")


def test_a_checkpoint_on_its_own_is_enough(here: Path) -> None:
    (here / "runs/dense/checkpoints/step_00000006").rename(here / "step_00000006")
    shutil.rmtree(here / "runs")
    saved = read_checkpoint(here / "step_00000006")[2]
    model = started("initial.checkpoint=step_00000006")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


def test_a_pickle_is_refused_and_never_executed(here: Path) -> None:
    path = here / "runs/dense/checkpoints/step_00000008"
    file, mark = path / "model.safetensors", here / "executed"
    file.write_bytes(pickle.dumps(Hostile(mark)))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": checkpoint.sealed.sha256(file)}
    manifest["digest"] = checkpoint.manifest.digest_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Refusal, match=r"model\.safetensors"):
        started(f"initial.checkpoint={path}")
    assert not mark.exists()
    started(*PLAIN)  # the newest good one
    assert not mark.exists()


@pytest.mark.distributed
def test_ranks_that_share_the_experts_start_alike(here: Path) -> None:
    train.main(load(*SPLIT, name="one"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train.py")]
    command = [*launcher, "dense.toml", "name=two", "parallel.expert=2", *SPLIT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("starts from runs/dense") == 1, "one rank speaks"
    for ours, theirs in zip(rows("two"), rows("one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
