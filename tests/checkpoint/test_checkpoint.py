"""Checkpoints come back bit for bit, or are refused by name."""

import errno
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint.manifest
import checkpoint.sealed
import checkpoint.snapshot
import checkpoint.writing
from checkpoint.checkpoints import Checkpoints, CheckpointSettings, read_checkpoint
from checkpoint.manifest import Damaged
from checkpoint.tensor_file import WrittenFile, write_tensor_file
from settings import Refusal, Section, to_toml

FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "state.json", "config.toml", "manifest.json")
Optimizers = list[torch.optim.Optimizer]


class Config(Section):
    """What a run's configuration may hold, as far as checkpoints are concerned."""

    name: str = "tiny"
    seed: int = 0
    threads: int = 1
    log: dict[str, int] | None = None


ORIGINAL = Config()


class Tiny(nn.Module):
    """Tied embeddings, a buffer that trains, and a parameter that never sees a gradient."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.idle = nn.Parameter(torch.ones(3))
        self.register_buffer("bias_E", torch.zeros(4))
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.bias_E += 0.1
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


def fused_adamw(model: nn.Module) -> Optimizers:
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    plain = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)]


def muon_and_adamw(model: nn.Module) -> Optimizers:
    hidden = model.get_parameter("hidden.weight")
    rest = [parameter for parameter in model.parameters() if parameter is not hidden]
    return [torch.optim.Muon([hidden], lr=2e-2), torch.optim.AdamW(rest, lr=1e-2)]


def sgd(model: nn.Module) -> Optimizers:
    return [torch.optim.SGD(model.parameters(), lr=1e-2)]


def build(
    make: Callable[[nn.Module], Optimizers] = fused_adamw, seed: int = 0, width: int = 6
) -> tuple[Tiny, Optimizers]:
    torch.manual_seed(seed)
    model = Tiny(width)
    return model, make(model)


def train(model: nn.Module, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            optimizer.step()


def open_in(
    folder: Path, model: nn.Module, optimizers: Optimizers, keep: int = 3, config: Config = ORIGINAL
) -> tuple[Checkpoints, list[str]]:
    warnings: list[str] = []
    settings = CheckpointSettings(keep=keep, asynchronous=False)
    return Checkpoints(folder, settings, model, optimizers, config, warnings.append), warnings


def saved_run(folder: Path, steps: int = 2, keep: int = 3) -> list[Path]:
    """Checkpoints of steps 1 … `steps`, oldest first."""
    model, optimizers = build()
    checkpoints, _ = open_in(folder, model, optimizers, keep)
    paths = []
    for step in range(steps):
        train(model, optimizers, range(step, step + 1))
        paths.append(checkpoints.save(step + 1, {"steps": step + 1}))
    return paths


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("make", [fused_adamw, muon_and_adamw, sgd])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path: Path, make: Callable, stop: int) -> None:
    unbroken, optimizers = build(make)
    train(unbroken, optimizers, range(6))
    first, optimizers = build(make)
    train(first, optimizers, range(stop))
    open_in(tmp_path, first, optimizers)[0].save(stop, {"steps": stop})
    train(first, optimizers, range(stop, 6))
    assert same_bits(first, unbroken), "saving changed the run"
    second, optimizers = build(make, seed=7)
    checkpoints, warnings = open_in(tmp_path, second, optimizers)
    assert checkpoints.restore_latest() == {"steps": stop} and checkpoints.latest_step == stop and not warnings
    train(second, optimizers, range(stop, 6))
    assert same_bits(second, unbroken)


def test_a_restore_does_not_depend_on_what_the_model_did_before(tmp_path: Path) -> None:
    saved_run(tmp_path, steps=3)
    results = []
    for steps_before in (0, 2):
        model, optimizers = build(seed=5)
        train(model, optimizers, range(steps_before))
        model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()  # a gradient left over
        open_in(tmp_path, model, optimizers)[0].restore_latest()
        train(model, optimizers, range(3, 5))
        results.append(model)
    assert same_bits(*results)


def test_an_empty_run_restores_nothing(tmp_path: Path) -> None:
    checkpoints, _ = open_in(tmp_path, *build())
    assert checkpoints.restore_latest() is None and checkpoints.latest_step is None


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["cut", "emptied", "flipped", "removed"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, file: str, harm: str) -> None:
    _, newest = saved_run(tmp_path)
    path = newest / file
    content = path.read_bytes()
    if harm == "removed":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        path.write_bytes({"cut": content[:-1], "emptied": b"", "flipped": flipped}[harm])
    model, optimizers = build(seed=3)
    checkpoints, warnings = open_in(tmp_path, model, optimizers)
    assert checkpoints.restore_latest() == {"steps": 1} and checkpoints.latest_step == 1
    assert len(warnings) == 1 and file in warnings[0] and newest.name in warnings[0]
    reference, reference_optimizers = build()
    train(reference, reference_optimizers, range(1))
    assert same_bits(model, reference)


def test_any_flipped_bit_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    path = saved_run(tmp_path, steps=1)[0] / "manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 37):
        for bit in (1, 32):
            path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
            with pytest.raises(Refusal, match=r"manifest\.json"):
                read_checkpoint(path.parent)


def test_when_no_checkpoint_is_good_all_are_named(tmp_path: Path) -> None:
    for number, path in enumerate(saved_run(tmp_path, steps=3)):
        (path / FILES[number]).write_bytes(b"x")
    checkpoints, _ = open_in(tmp_path, *build())
    with pytest.raises(Refusal) as refused:
        checkpoints.restore_latest()
    assert all(word in str(refused.value) for word in (*FILES[:3], "step_00000001", "step_00000002", "step_00000003"))


def test_what_a_killed_save_left_is_removed_and_the_one_before_is_used(tmp_path: Path) -> None:
    *_, newest = saved_run(tmp_path)
    partial = newest.with_name(".partial_step_00000003")
    shutil.copytree(newest, partial)
    (partial / "manifest.json").unlink()
    checkpoints, warnings = open_in(tmp_path, *build())
    assert not partial.exists() and not warnings
    assert checkpoints.restore_latest() == {"steps": 2}


def test_a_kill_while_a_checkpoint_is_replaced_puts_the_old_one_back(tmp_path: Path) -> None:
    *_, newest = saved_run(tmp_path)
    newest.rename(newest.with_name(f".replaced_{newest.name}"))
    checkpoints, _ = open_in(tmp_path, *build())
    assert checkpoints.restore_latest() == {"steps": 2}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    saved_run(tmp_path, steps=5, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000005"]


def test_damaged_checkpoints_do_not_push_good_ones_out(tmp_path: Path) -> None:
    paths = saved_run(tmp_path, steps=4, keep=4)
    for path in paths[2:]:
        (path / "state.json").unlink()
    model, optimizers = build()
    checkpoints, _ = open_in(tmp_path, model, optimizers, keep=2)
    assert checkpoints.restore_latest() == {"steps": 2}
    checkpoints.save(3, {"steps": 3})
    assert sorted(path.name[-1] for path in checkpoints.folder.iterdir()) == ["2", "3", "4"]
    assert open_in(tmp_path, *build())[0].restore_latest() == {"steps": 3}
    checkpoints.save(4, {"steps": 4})
    assert sorted(path.name[-1] for path in checkpoints.folder.iterdir()) == ["3", "4"]


def test_an_old_damaged_checkpoint_does_not_push_a_good_one_out(tmp_path: Path) -> None:
    paths = saved_run(tmp_path, steps=4, keep=4)
    (paths[2] / "optimizer.json").write_text("{}")  # older than the newest, so that restoring does not look at it
    model, optimizers = build()
    checkpoints, warnings = open_in(tmp_path, model, optimizers, keep=3)
    assert checkpoints.restore_latest() == {"steps": 4}
    checkpoints.save(5, {"steps": 5})
    assert sorted(path.name[-1] for path in checkpoints.folder.iterdir()) == ["2", "4", "5"]
    assert len(warnings) == 1 and "step_00000003" in warnings[0]


def test_a_renamed_checkpoint_is_passed_over_by_name(tmp_path: Path) -> None:
    older, newest = saved_run(tmp_path)
    renamed = newest.rename(newest.with_name("step_00000009"))
    model, optimizers = build(seed=2)
    checkpoints, warnings = open_in(tmp_path, model, optimizers)
    assert checkpoints.restore_latest() == {"steps": 1} and checkpoints.latest_step == 1
    assert len(warnings) == 1 and "step_00000009" in warnings[0] and "says step 2" in warnings[0]
    with pytest.raises(Refusal, match="says step 2"):
        read_checkpoint(renamed)
    train(model, optimizers, range(1, 9))
    checkpoints.save(9, {"steps": 9})
    assert open_in(tmp_path, *build())[0].restore_latest() == {"steps": 9}
    assert older.is_dir()


def test_a_state_of_another_step_is_damage(tmp_path: Path) -> None:
    checkpoints, _ = open_in(tmp_path, *build())
    checkpoints.save(1, {"step": 1, "tokens": 10})
    checkpoints.save(2, {"step": 1, "tokens": 10})
    checkpoints, warnings = open_in(tmp_path, *build())
    assert checkpoints.restore_latest() == {"step": 1, "tokens": 10} and checkpoints.latest_step == 1
    assert "state.json says step 1" in warnings[0]


def test_a_checkpoint_of_another_configuration_is_passed_over_by_name(tmp_path: Path) -> None:
    foreign, _ = open_in(tmp_path / "other", *build(), config=Config(name="o", seed=1))
    copied = foreign.save(7, {"steps": 7})
    saved_run(tmp_path)
    shutil.copytree(copied, tmp_path / "checkpoints" / copied.name)
    checkpoints, warnings = open_in(tmp_path, *build(seed=4))
    assert checkpoints.restore_latest() == {"steps": 2}
    assert len(warnings) == 1 and copied.name in warnings[0] and "seed" in warnings[0]
    with pytest.raises(Refusal, match="another configuration"):
        open_in(tmp_path / "other", *build())[0].restore_latest()
    watched_otherwise = Config(name="renamed", threads=4, log={"every_steps": 1})
    checkpoints, warnings = open_in(tmp_path, *build(), config=watched_otherwise)
    shutil.rmtree(tmp_path / "checkpoints" / copied.name)
    assert checkpoints.restore_latest() == {"steps": 2} and not warnings


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_a_file_that_cannot_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    paths = saved_run(tmp_path, steps=3)
    checkpoints, warnings = open_in(tmp_path, *build(), keep=2)

    def failing(path: Path) -> str:
        raise OSError(code, "not now", str(path))

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint.sealed, "sha256", failing)
        with pytest.raises(Refusal, match=r"step_00000003/.*not now"):
            checkpoints.restore_latest()
        with pytest.raises(Refusal, match="not now"):
            read_checkpoint(tmp_path)
        checkpoints.keeping.prune(paths[-1])
    assert all(path.is_dir() for path in paths) and not warnings
    assert checkpoints.restore_latest() == {"steps": 3}


def test_another_models_checkpoint_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    saved_run(tmp_path)
    model, optimizers = build(width=8, seed=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Refusal) as refused:
        open_in(tmp_path, model, optimizers)[0].restore_latest()
    assert all(word in str(refused.value) for word in ("hidden.weight", "(6, 6)", "(8, 8)", "step_00000002"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not optimizers[0].state


def test_missing_and_extra_tensors_are_named(tmp_path: Path) -> None:
    saved_run(tmp_path)
    model, _ = build()
    model.extra = nn.Linear(2, 2)
    del model.bias_E
    with pytest.raises(Refusal) as refused:
        open_in(tmp_path, model, fused_adamw(model))[0].restore_latest()
    message = str(refused.value)
    assert "extra.weight: not in the checkpoint" in message and "bias_E: only in the checkpoint" in message


def test_another_optimizers_state_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    saved_run(tmp_path)
    model, optimizers = build(muon_and_adamw, seed=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Refusal, match=r"optimizer.*\n.*hidden\.weight\.exp_avg"):
        open_in(tmp_path, model, optimizers)[0].restore_latest()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(optimizer.state for optimizer in optimizers)


def break_writing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let the optimizer's file come to grief halfway."""

    def writing(path: Path, outlines: dict, tensors: Iterator[tuple[str, torch.Tensor]]) -> WrittenFile:
        if path.name != "optimizer.safetensors":
            return write_tensor_file(path, outlines, tensors)
        next(tensors, None)
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint.snapshot, "write_tensor_file", writing)


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("torch_archive", [False, True])
def test_a_pickle_is_refused_and_never_executed(tmp_path: Path, forged: bool, torch_archive: bool) -> None:
    path = saved_run(tmp_path, steps=1)[0]
    mark, file = tmp_path / "executed", path / "model.safetensors"
    if torch_archive:
        torch.save(Hostile(mark), file)
    else:
        file.write_bytes(pickle.dumps(Hostile(mark)))
    if forged:  # the manifest agrees with the file: the reader itself must refuse it
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": checkpoint.sealed.sha256(file)}
        manifest["digest"] = checkpoint.manifest.digest_of(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Refusal, match=r"model\.safetensors"):
        open_in(tmp_path, *build())[0].restore_latest()
    with pytest.raises(Refusal, match=r"model\.safetensors"):
        read_checkpoint(path)
    assert not mark.exists()
    assert pickle.loads(pickle.dumps(Hostile(mark))) is None and mark.exists(), "the pickle was harmless"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    model, optimizers = build()
    checkpoints, _ = open_in(tmp_path, model, optimizers)
    checkpoints.save(1, {"steps": 1})
    break_writing(monkeypatch, OSError(code, "full"))
    with pytest.raises(Refusal) as refused:
        checkpoints.save(2, {"steps": 2})
    message = str(refused.value)
    assert all(word in message for word in ("step_00000001 is intact", "MB are free", "needs", str(checkpoints.folder)))
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000001"]
    monkeypatch.undo()
    assert checkpoints.save(2, {"steps": 2}).is_dir()


def test_too_little_free_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, _ = open_in(tmp_path, *build())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.writing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(Refusal, match="no earlier checkpoint"):
        checkpoints.save(1, {})
    assert not list(checkpoints.folder.iterdir())


def test_another_failure_of_a_save_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, _ = open_in(tmp_path, *build())
    break_writing(monkeypatch, OSError(errno.EIO, "the disk is dying"))
    with pytest.raises(Refusal, match="dying"):
        checkpoints.save(1, {})
    break_writing(monkeypatch, TypeError("our own fault"))
    with pytest.raises(RuntimeError, match="our own fault"):
        checkpoints.save(1, {})
    assert not list(checkpoints.folder.iterdir())


def test_a_step_just_written_is_not_written_twice(tmp_path: Path) -> None:
    checkpoints, _ = open_in(tmp_path, *build())
    written = checkpoints.save(1, {"steps": 1})
    before = (written / "manifest.json").stat()
    assert checkpoints.save(1, {"steps": 1}) == written and (written / "manifest.json").stat() == before


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    *_, newest = saved_run(tmp_path)
    (newest / "state.json").unlink()
    model, optimizers = build(seed=2)
    checkpoints, _ = open_in(tmp_path, model, optimizers)
    assert checkpoints.restore_latest() == {"steps": 1}
    train(model, optimizers, range(1, 2))
    checkpoints.save(2, {"steps": 2, "again": True})
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step_00000001", "step_00000002"]
    again, optimizers = build(seed=3)
    checkpoints, warnings = open_in(tmp_path, again, optimizers)
    assert checkpoints.restore_latest() == {"steps": 2, "again": True} and not warnings
    assert same_bits(again, model)


def test_checkpoints_are_due_every_so_many_steps(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(every_steps=4), *build(), ORIGINAL, print)
    assert [step for step in range(1, 13) if checkpoints.due(step)] == [4, 8, 12]


def test_what_stays_for_good_is_due_as_well_and_never_removed(tmp_path: Path) -> None:
    model, optimizers = build()
    settings = CheckpointSettings(every_steps=2, keep=1, keep_every=5, asynchronous=False)
    checkpoints = Checkpoints(tmp_path, settings, model, optimizers, ORIGINAL, print)
    due = [step for step in range(1, 16) if checkpoints.due(step)]
    assert due == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    for step in due[:-1]:
        checkpoints.save(step, {"step": step})
    kept = sorted(path.name for path in checkpoints.folder.iterdir())
    assert kept == ["step_00000005", "step_00000010", "step_00000014"]


def test_the_newest_good_one_is_never_removed(tmp_path: Path) -> None:
    """Also when newer ones, damaged or of another configuration, stand beside it."""
    paths = saved_run(tmp_path, steps=4, keep=9)
    for path in paths[2:]:
        (path / "config.toml").write_bytes(b"seed = 9")
    model, optimizers = build()
    checkpoints, warnings = open_in(tmp_path, model, optimizers, keep=1)
    checkpoints.save(3, {"steps": 3})
    assert sorted(path.name[-1] for path in checkpoints.folder.iterdir()) == ["3", "4"] and warnings
    assert open_in(tmp_path, *build())[0].restore_latest() == {"steps": 3}


def test_the_one_just_written_stays_beside_later_steps(tmp_path: Path) -> None:
    saved_run(tmp_path, steps=5, keep=9)
    checkpoints, _ = open_in(tmp_path, *build(), keep=1)
    checkpoints.save(3, {"steps": 3})
    assert sorted(path.name[-1] for path in checkpoints.folder.iterdir()) == ["3", "5"]


def test_the_manifest_describes_every_file_and_tensor(tmp_path: Path) -> None:
    path = saved_run(tmp_path, steps=1)[0]
    manifest = json.loads((path / "manifest.json").read_text())
    assert (
        set(manifest["files"])
        == {file.name for file in path.iterdir()} - {"manifest.json"}
        == set(FILES) - {"manifest.json"}
    )
    assert manifest["tensors"]["model.safetensors"]["hidden.weight"] == {"dtype": "float32", "shape": [6, 6]}
    assert all(
        facts == {"bytes": (path / name).stat().st_size, "sha256": checkpoint.sealed.sha256(path / name)}
        for name, facts in manifest["files"].items()
    )


def test_files_that_safetensors_itself_wrote_under_the_first_manifest_are_read(tmp_path: Path) -> None:
    """As versions before fingerprints left them: tensors in another order, no word of experts."""
    path = saved_run(tmp_path)[-1]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 1
    for file in manifest["tensors"]:
        save_file(load_file(path / file), path / file)
        manifest["files"][file] = {
            "bytes": (path / file).stat().st_size,
            "sha256": checkpoint.sealed.sha256(path / file),
        }
    del manifest["experts"], manifest["digest"]
    manifest["digest"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    model, optimizers = build(seed=8)
    checkpoints, warnings = open_in(tmp_path, model, optimizers)
    assert checkpoints.restore_latest() == {"steps": 2} and not warnings
    expected, expected_optimizers = build()
    train(expected, expected_optimizers, range(2))
    assert same_bits(model, expected)
    train(expected, expected_optimizers, range(2, 4))
    train(model, optimizers, range(2, 4))
    assert same_bits(model, expected), "the moments are others"


def test_read_checkpoint_takes_a_run_or_one_checkpoint(tmp_path: Path) -> None:
    older, newest = saved_run(tmp_path)
    (newest / "config.toml").write_text("altered")
    warnings: list[str] = []
    for place, expected in ((tmp_path, 1), (tmp_path / "checkpoints", 1), (older, 1)):
        state, config, tensors = read_checkpoint(place, warnings.append)
        assert state == {"steps": expected} and config == to_toml(ORIGINAL)
        model, _ = build(seed=9)
        model.load_state_dict(tensors, strict=True)
        assert torch.equal(tensors["head.weight"], tensors["embedding.weight"])
    assert len(warnings) == 2 and "config.toml" in warnings[0]
    with pytest.raises(Refusal, match=r"config\.toml"):
        read_checkpoint(newest)
    with pytest.raises(Refusal, match="no such folder"):
        read_checkpoint(tmp_path / "step_00000009")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refusal, match="holds no checkpoint"):
        read_checkpoint(tmp_path / "empty")


def test_the_ends_of_stages_stay_beside_the_newest(tmp_path: Path) -> None:
    model, optimizers = build()
    checkpoints, _ = open_in(tmp_path, model, optimizers, keep=2)
    for step in range(1, 8):
        checkpoints.save(step, {"step": step}, is_stage_end=step in (2, 5, 7))
    assert [path.name[-1] for path in sorted((tmp_path / "checkpoints").iterdir())] == ["2", "5", "6", "7"]
    again, _ = open_in(tmp_path, model, optimizers, keep=1)
    again.save(8, {"step": 8})
    assert [path.name[-1] for path in sorted((tmp_path / "checkpoints").iterdir())] == ["2", "5", "7", "8"]


def test_a_checkpoint_of_another_folder_is_loaded_and_not_taken_for_ones_own(tmp_path: Path) -> None:
    theirs = saved_run(tmp_path / "theirs", steps=3)[-1]
    model, optimizers = build(seed=1)
    checkpoints, _ = open_in(tmp_path / "ours", model, optimizers)
    assert checkpoints.restore(theirs) == {"steps": 3} and checkpoints.latest_step is None
    _, _, weights = read_checkpoint(theirs)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert optimizers[0].state and checkpoints.restore_latest() is None
    (theirs / "optimizer.json").write_text("{}")
    with pytest.raises(Damaged, match=r"optimizer.json"):
        checkpoints.restore(theirs)
