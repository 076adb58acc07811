"""A checkpoint that somebody made to harm: one clear refusal, nothing runs, nothing outside its folder is opened."""

import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from checkpoint.checkpoints import Checkpoints, CheckpointSettings, read_checkpoint
from checkpoint.manifest import MANIFEST, digest_of
from checkpoint.sealed import sha256
from settings import Refusal, Section

WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "optimizer.safetensors", "optimizer.json", "state.json", "config.toml")
opened: list[str] | None = None
"""Every path that Python opens, while somebody listens."""


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if opened is not None and event in ("open", "os.listdir", "os.scandir", "subprocess.Popen", "os.system"):
        opened.append(str(arguments[0]))


sys.addaudithook(_listen)


@contextmanager
def listening() -> Iterator[list[str]]:
    global opened  # noqa: PLW0603 (a hook cannot be taken away again)
    opened = []
    try:
        yield opened
    finally:
        opened = None


class Config(Section):
    """A run's configuration, as far as checkpoints are concerned."""

    seed: int = 0


class Hostile:
    """Whoever unpickles this makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A good checkpoint of a run, beside a secret."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("{}")
    checkpoints = build(tmp_path / "run")
    folder = checkpoints.save(1, {"step": 1})
    checkpoints.close()
    return folder


def build(folder: Path) -> Checkpoints:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return Checkpoints(folder, CheckpointSettings(), model, [optimizer], Config(), lambda line: None)


def forge(folder: Path, name: str = "", change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Let the manifest agree with what stands in a file now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if name:
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    change(manifest)
    manifest["digest"] = digest_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def refusals(folder: Path) -> list[str]:
    """What a reader and a run that resumes say; that they open nothing outside the folder is asserted."""
    said = []
    checkpoints = build(folder.parents[1])
    before = [tensor.clone() for tensor in checkpoints.model.state_dict().values()]
    for act in (lambda: read_checkpoint(folder), checkpoints.restore_latest):
        with listening() as paths, pytest.raises(Refusal) as refused:
            act()
        said.append(str(refused.value))
        run = str(folder.parents[1])
        strange = [p for p in paths if os.path.isabs(p) and not p.startswith((run, sys.prefix, sys.base_prefix))]
        assert not [path for path in strange if "outside" in path or path.startswith("/etc")], strange
    assert all(map(torch.equal, before, checkpoints.model.state_dict().values()))
    return said


def assert_refused(folder: Path, *words: str) -> None:
    for said in refusals(folder):
        assert all(word in said for word in words), said
        assert len(said) < 1000, "a message nobody can read"


def pickled(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile(canary)))


def archived(path: Path, canary: Path) -> None:
    torch.save(Hostile(canary), path)


def zipped(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Hostile(canary)))


def reduced(path: Path, canary: Path) -> None:
    call = {"__reduce__": ["os.system", [f"touch {canary}"]], "py/object": "os.system", "__class__": "Hostile"}
    path.write_text(json.dumps({**call, "numbers": call, "untouched": [call], "step": call}))


PAYLOADS = [pickled, archived, zipped, reduced]


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", FILES)
def test_a_payload_in_place_of_a_file_is_refused_and_never_runs(
    victim: Path, tmp_path: Path, name: str, payload: Callable
) -> None:
    canary = tmp_path / "canary"
    payload(victim / name, canary)
    assert_refused(victim, name)
    forge(victim, name)
    checkpoints = build(tmp_path / "run")
    with pytest.raises(Refusal) as refused:
        checkpoints.restore_latest()
    assert name in str(refused.value)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Hostile(canary)))
    assert canary.exists(), "the payload was harmless"


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_beside_the_files_is_never_looked_at(victim: Path, tmp_path: Path, payload: Callable) -> None:
    canary = tmp_path / "canary"
    names = (
        "pytorch_model.bin",
        "model.pt",
        "optimizer.pt",
        "model.ckpt",
        "training_args.bin",
        "rng_state.pth",
        "x.pkl",
    )
    for name in (*names, "model.safetensors.index.json", "__init__.py", "conftest.py"):
        payload(victim / name, canary)
    with listening() as paths:
        assert build(tmp_path / "run").restore_latest() == {"step": 1}
        assert read_checkpoint(victim)[0] == {"step": 1}
    assert not [path for path in paths if Path(path).name in names] and not canary.exists()


def header(table: Any, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(*shape: int, place: tuple[int, int] = (0, 24), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


HEADERS = {
    "a header longer than the file": struct.pack("<Q", 1 << 60) + b"{}",
    "a header of 200 MB": struct.pack("<Q", 200_000_000) + b"{}",
    "no header": b"",
    "half a header": struct.pack("<Q", 100) + b'{"weight"',
    "deep": header(b'{"weight":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "no table": header([1, 2]),
    "not UTF-8": header(b'{"\xff": 1}'),
    "beyond the end": header({"weight": tensor(3, 2, place=(0, 1 << 62))}, bytes(24)),
    "before the beginning": header({"weight": tensor(3, 2, place=(-24, 0))}, bytes(24)),
    "backwards": header({"weight": tensor(3, 2, place=(24, 0))}, bytes(24)),
    "a shape too large for any number": header({"weight": tensor(1 << 62, 1 << 62)}, bytes(24)),
    "a negative shape": header({"weight": tensor(-3, -2)}, bytes(24)),
    "a shape that does not fit": header({"weight": tensor(300, 2)}, bytes(24)),
    "two in one place": header({"weight": tensor(3, 2), "bias": tensor(3, 2)}, bytes(24)),
    "a hole": header({"weight": tensor(3, 2, place=(8, 32))}, bytes(32)),
    "more than it says": header({"weight": tensor(3, 2)}, bytes(99)),
    "another dtype": header({"weight": tensor(6, 2, dtype="F16")}, bytes(24)),
    "a dtype that is none": header({"weight": tensor(3, 2, dtype="OBJ")}, bytes(24)),
    "a dtype of four bits": header({"weight": tensor(24, 2, dtype="F4")}, bytes(24)),
    "one name twice": header(
        b'{"weight":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]},'
        b'"weight":{"dtype":"F32","shape":[3,2],"data_offsets":[24,48]}}',
        bytes(48),
    ),
    "no tensors": header({}),
    "an extra tensor": header(
        {"weight": tensor(3, 2), "bias": tensor(3, place=(24, 36)), "more": tensor(1, place=(36, 40))}, bytes(40)
    ),
    "a missing one": header({"weight": tensor(3, 2)}, bytes(24)),
    "another shape": header({"weight": tensor(2, 3), "bias": tensor(3, place=(24, 36))}, bytes(36)),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies_is_refused(victim: Path, kind: str) -> None:
    (victim / WEIGHTS).write_bytes(HEADERS[kind])
    forge(victim, WEIGHTS)
    assert_refused(victim, WEIGHTS)


NAMES = (
    "../../../outside/secret",
    "/etc/hostname",
    "..",
    ".",
    "",
    "a/../../b",
    "..\\up",
    "nul\0",
    "manifest.json",
    "a/b",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["files", "tensors"])
def test_a_name_that_leads_out_of_the_folder_is_refused(victim: Path, name: str, where: str) -> None:
    facts = {"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = facts
        if where == "tensors":
            manifest["tensors"][name] = {}
            manifest["tied"][name] = {}

    forge(victim, change=change)
    assert_refused(victim, MANIFEST)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("kind", ["link", "link to itself", "folder", "pipe"])
def test_what_is_no_file_of_its_own_is_refused(victim: Path, tmp_path: Path, name: str, kind: str) -> None:
    path, target = victim / name, tmp_path / "outside" / name
    path.rename(target)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":  # opening it would wait for good
        os.mkfifo(path)
    else:
        path.symlink_to(target if kind == "link" else path)
    assert_refused(victim, name)


BOMBS = {
    "deep lists": "[" * 200_000 + "]" * 200_000,
    "deep tables": '{"a":' * 200_000 + "1" + "}" * 200_000,
    "a number of a million digits": '{"step": ' + "9" * 1_000_000 + "}",
    "NaN": '{"step": NaN, "numbers": {"x": NaN}, "untouched": []}',
    "infinity": '{"step": Infinity, "numbers": {"x": -Infinity}, "untouched": []}',
    "no table": "[1, 2, 3]",
    "null": "null",
    "a word": '"step"',
    "not UTF-8": "\udcff",
    "empty": "",
}


@pytest.mark.parametrize("name", ["state.json", "optimizer.json", MANIFEST])
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_of_json_is_refused(victim: Path, name: str, kind: str) -> None:
    (victim / name).write_bytes(BOMBS[kind].encode("utf-8", "surrogateescape"))
    if name != MANIFEST:
        forge(victim, name)
    with pytest.raises(Refusal, match=name):
        build(victim.parents[1]).restore_latest()


def test_a_text_without_end_is_refused_unread(victim: Path) -> None:
    with (victim / "state.json").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with listening() as paths, pytest.raises(Refusal, match=r"state\.json"):
        build(victim.parents[1]).restore_latest()
    assert str(victim / "state.json") not in paths
    with (victim / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)
    assert_refused(victim, MANIFEST)


@pytest.mark.parametrize(
    "text", ['extends = "/etc/hostname"', 'extends = "../../../outside/secret"', "seed = {", "x = 1"]
)
def test_a_configuration_that_names_files_opens_none(victim: Path, text: str) -> None:
    (victim / "config.toml").write_text(text)
    forge(victim, "config.toml")
    with listening() as paths, pytest.raises(Refusal, match=r"config\.toml"):
        build(victim.parents[1]).restore_latest()
    assert not [path for path in paths if "secret" in path or path.startswith("/etc")]


def options(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda numbers: numbers.update({f"param_groups.weight.{key}": value for key, value in changed.items()})


@pytest.mark.parametrize(
    "change",
    [
        options(lr="0.1"),
        options(lr={"__reduce__": 1}),
        options(betas="ab"),
        options(weight_decay=[0.1]),
        options(lr=0.5),
    ],
    ids=["a word", "a table", "no pair", "a list", "not that of its group"],
)
def test_an_option_of_another_kind_is_refused(victim: Path, change: Callable) -> None:
    values = json.loads((victim / "optimizer.json").read_text())
    change(values["numbers"])
    (victim / "optimizer.json").write_text(json.dumps(values))
    forge(victim, "optimizer.json")
    with pytest.raises(Refusal, match=r"param_groups\.\w+\.\w+"):
        build(victim.parents[1]).restore_latest()


STRANGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_manifest_with_anything_in_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever stands in one place of it, its digest forged: never another end than one of these two."""
    folder = data.draw(st.just(_one_victim(tmp_path_factory)))
    whole = (folder / MANIFEST).read_text()
    manifest = place = json.loads(whole)
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not (isinstance(place[key], dict) and place[key]) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(STRANGE)
    manifest["digest"] = digest_of(manifest) if isinstance(manifest, dict) else ""
    (folder / MANIFEST).write_text(json.dumps(manifest))
    try:
        build(folder.parents[1]).restore_latest()
    except Refusal as refusal:
        assert folder.name in str(refusal)
    finally:
        (folder / MANIFEST).write_text(whole)


def _one_victim(factory: pytest.TempPathFactory) -> Path:
    folder = factory.getbasetemp() / "one_victim"
    step = folder / "checkpoints" / "step_00000001"
    if not step.exists():
        checkpoints = build(folder)
        checkpoints.save(1, {"step": 1})
        checkpoints.close()
    return step
