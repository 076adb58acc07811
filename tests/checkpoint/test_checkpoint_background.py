"""A checkpoint is what the run was when it was saved, though it trains on while files are written."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint.snapshot
from checkpoint.checkpoints import Checkpoints, CheckpointSettings, read_checkpoint
from checkpoint.tensor_file import WrittenFile, write_tensor_file
from checkpoint.writing import settle
from settings import Refusal, Section


class Config(Section):
    """A run's configuration, as far as checkpoints are concerned."""

    seed: int = 0


class Gate:
    """Holds back what a thread writes until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached, self.error = threading.Event(), threading.Event(), None
        monkeypatch.setattr(checkpoint.snapshot, "write_tensor_file", self.write)

    def write(self, path: Path, outlines: dict, tensors: Iterator[tuple[str, torch.Tensor]]) -> WrittenFile:
        self.reached.set()
        assert self.opened.wait(20)
        if self.error is not None:
            raise self.error
        return write_tensor_file(path, outlines, tensors)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()
    settle()


def build(folder: Path, **options: object) -> tuple[nn.Module, torch.optim.Optimizer, Checkpoints]:
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    checkpoints = Checkpoints(folder, CheckpointSettings(**options), model, [optimizer], Config(), print)
    return model, optimizer, checkpoints


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_what_is_saved_is_what_was_there_at_the_call(tmp_path: Path, gate: Gate) -> None:
    model, optimizer, checkpoints = build(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()]
    state = {"step": 1, "rows": [{"score": 0.5}]}
    checkpoints.save(1, state)
    assert gate.reached.wait(20) and names(checkpoints) == [".partial_step_00000001"]
    assert checkpoints.latest_step == 1 and not checkpoints.has_failed
    state["rows"][0]["score"] = 0.9
    optimizer.param_groups[0]["lr"] = 0.7
    step(model, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    gate.opened.set()
    checkpoints.wait()
    assert names(checkpoints) == ["step_00000001"]
    model, optimizer, again = build(tmp_path)
    optimizer.param_groups[0]["lr"] = 0.9
    assert again.restore_latest() == {"step": 1, "rows": [{"score": 0.5}]}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for ours, theirs in zip(optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, gate: Gate) -> None:
    model, optimizer, checkpoints = build(tmp_path)
    checkpoints.save(1, {"step": 1})
    assert gate.reached.wait(20)
    step(model, optimizer)
    second = model.weight.detach().clone()
    saving = threading.Thread(target=checkpoints.save, args=(2, {"step": 2}))
    saving.start()
    saving.join(0.2)
    assert saving.is_alive() and names(checkpoints) == [".partial_step_00000001"]
    gate.opened.set()
    saving.join(20)
    checkpoints.close()
    assert names(checkpoints) == ["step_00000001", "step_00000002"]
    assert torch.equal(read_checkpoint(tmp_path)[2]["weight"], second)


def test_a_failure_is_told_by_the_next_call_and_the_run_can_go_on(tmp_path: Path, gate: Gate) -> None:
    _, _, checkpoints = build(tmp_path)
    gate.opened.set()
    checkpoints.save(1, {"step": 1})
    checkpoints.wait()
    gate.error = OSError(28, "full")
    checkpoints.save(2, {"step": 2})
    settle()
    assert checkpoints.has_failed and checkpoints.latest_step == 2
    with pytest.raises(Refusal, match=r"disk is full.*step_00000001 is intact"):
        checkpoints.save(3, {"step": 3})
    assert checkpoints.latest_step == 1 and names(checkpoints) == ["step_00000001"]
    checkpoints.save(4, {"step": 4})
    with pytest.raises(Refusal, match="disk is full"):
        checkpoints.close()
    gate.error = None
    assert not checkpoints.has_failed and names(checkpoints) == ["step_00000001"]


@pytest.mark.parametrize("way", ["stage end", "not asynchronous", "wait", "close", "restore", "another"])
def test_what_waits_until_it_is_on_the_disk(tmp_path: Path, gate: Gate, way: str) -> None:
    _, _, checkpoints = build(tmp_path, asynchronous=way != "not asynchronous")
    threading.Timer(0.1, gate.opened.set).start()
    checkpoints.save(1, {"step": 1}, is_stage_end=way == "stage end")
    acts = {
        "wait": checkpoints.wait,
        "close": checkpoints.close,
        "restore": checkpoints.restore_latest,
        "another": lambda: build(tmp_path),
    }
    acts.get(way, lambda: None)()
    assert names(checkpoints) == ["step_00000001"]


def test_memory_of_a_snapshot_is_used_again(tmp_path: Path) -> None:
    model, optimizer, checkpoints = build(tmp_path)
    checkpoints.save(1, {"step": 1})
    checkpoints.wait()
    places = {name: tensor.data_ptr() for name, tensor in checkpoints._camera._host.items()}
    step(model, optimizer)
    checkpoints.save(2, {"step": 2})
    assert {name: tensor.data_ptr() for name, tensor in checkpoints._camera._host.items()} == places
    checkpoints.close()
    assert torch.equal(read_checkpoint(tmp_path)[2]["weight"], model.weight)


def test_what_an_optimizer_forgets_or_first_keeps_is_saved_as_it_is(tmp_path: Path) -> None:
    model, optimizer, checkpoints = build(tmp_path, asynchronous=False)
    for number, act in enumerate((lambda: None, optimizer.state.clear, lambda: step(model, optimizer))):
        act()
        checkpoints.save(number + 1, {"step": number + 1})
        manifest = json.loads((checkpoints.folder / f"step_0000000{number + 1}/manifest.json").read_text())
        assert len(manifest["tensors"]["optimizer.safetensors"]) == (0 if number == 1 else 6)


SAVING = """
import itertools, os, signal, sys, time, torch
from pathlib import Path
from torch import nn
from checkpoint.checkpoints import Checkpoints, CheckpointSettings, read_checkpoint
from settings import Section

class Config(Section):
    seed: int = 0

def train(folder, steps):
    model = nn.Linear(300, 3000)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    checkpoints = Checkpoints(folder, CheckpointSettings(keep=2), model, [optimizer], Config(), print)
    begin = (checkpoints.restore_latest() or {"step": 0})["step"]
    assert (model.weight == begin).all(), "a half-written checkpoint was taken"
    for step in itertools.islice(itertools.count(begin + 1), steps):
        with torch.no_grad():
            model.weight.add_(1.0)
        checkpoints.save(step, {"step": step})

folder, before = Path(sys.argv[1]), 0
for delay in map(float, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        train(folder, None)
    while not (folder / "checkpoints" / f"step_{before + 1:08d}").exists():
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it fell over by itself"
    state, _, weights = read_checkpoint(folder)
    assert state["step"] > before, "it never got on"
    assert (weights["weight"] == state["step"]).all()
    before = state["step"]
if not sys.argv[2:]:
    train(folder, 3)
"""


def saving(folder: Path, *delays: float) -> int:
    """The status of a process that saves 3 steps, or that lets others do so and kills each after a while."""
    command = [sys.executable, "-c", SAVING, str(folder), *map(str, delays)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, timeout=300, check=False).returncode


def test_a_kill_at_any_moment_leaves_a_good_checkpoint_behind(tmp_path: Path) -> None:
    assert saving(tmp_path, 0.02, 0.11, 0.05, 0.23, 0.004) == 0


def test_the_end_of_the_interpreter_waits_for_the_last_save(tmp_path: Path) -> None:
    assert saving(tmp_path) == 0
    assert read_checkpoint(tmp_path)[0] == {"step": 3}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
