"""A folder of files under one manifest: written beside and renamed, and read back only when every byte is as written.

A manifest holds the size and the SHA-256 of every file, the dtype and the shape of every tensor, and a digest of
itself. Tensors are in safetensors and everything else is JSON or TOML, so that reading a folder cannot run code that
somebody put there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from settings import Refusal

MANIFEST = "manifest.json"
FORMAT = 1
Manifest = dict[str, Any]
Tensors = dict[str, torch.Tensor]


class Damaged(Exception):
    """A file of a sealed folder is not what was written; the message names the file and the difference."""


def write_sealed(
    target: Path, texts: Mapping[str, str], tensors: Mapping[str, Tensors], facts: Mapping[str, Any]
) -> None:
    """Write files into a partial folder beside `target`, flush them to the disk, and rename: all of it, or nothing.

    texts: file name -> content; tensors: file name -> named tensors, which may be tied or on any device; facts go into
    the manifest as they are. A folder that stood at `target` is replaced. On any error the partial folder is removed.
    """
    partial = target.with_name(f".partial_{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        manifest: Manifest = {"format": FORMAT, **facts, "files": {}, "tensors": {}, "tied": {}}
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        for name, named in tensors.items():
            kept, manifest["tied"][name] = _whole(named)
            save_file(kept, partial / name)
            manifest["tensors"][name] = {key: _shape_of(tensor) for key, tensor in kept.items()}
        for name in (*texts, *tensors):
            _to_disk(partial / name)
            manifest["files"][name] = {"bytes": (partial / name).stat().st_size, "sha256": sha256(partial / name)}
        manifest["digest"] = _digest(manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _to_disk(partial / MANIFEST)
        _to_disk(partial)
        _swap(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def clean(folder: Path) -> None:
    """Remove what dead writers left in `folder`; a folder caught halfway through being replaced is put back."""
    for replaced in folder.glob(".replaced_*"):
        target = replaced.with_name(replaced.name.removeprefix(".replaced_"))
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(target)
    for partial in folder.glob(".partial_*"):
        shutil.rmtree(partial, ignore_errors=True)


def verify(folder: Path) -> Manifest:
    """The manifest of a folder whose every file is as it was written; raises Damaged naming the first that is not.

    Only a missing file and a wrong content are damage. Raises Refusal when a file cannot be read at all: that says
    nothing about what is in it.
    """
    manifest = _read_manifest(folder)
    for name, facts in manifest["files"].items():
        path = folder / name
        with _reading(path):
            size = path.stat().st_size
            digest = sha256(path) if size == facts["bytes"] else ""
        if size != facts["bytes"]:
            raise Damaged(f"{name} holds {size} bytes, the manifest says {facts['bytes']}")
        if digest != facts["sha256"]:
            raise Damaged(f"{name} has SHA-256 {digest[:16]}…, the manifest says {facts['sha256'][:16]}…")
    return manifest


def read_tensors(folder: Path, name: str, manifest: Manifest) -> Tensors:
    """The tensors of one file, on the CPU, tied ones under each of their names.

    Raises Damaged when it is not safetensors, or when they are not the tensors of the manifest.
    """
    try:
        with _reading(folder / name), safe_open(folder / name, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise Damaged(f"{name} is not a safetensors file: {error}") from None
    found, promised = {key: _shape_of(tensor) for key, tensor in tensors.items()}, manifest["tensors"][name]
    if found != promised:
        different = sorted(key for key in {*found, *promised} if found.get(key) != promised.get(key))
        raise Damaged(f"{name} does not hold the tensors of the manifest: {', '.join(different[:5])}")
    return tensors | {name: tensors[kept] for name, kept in manifest["tied"][name].items()}


def read_text(folder: Path, name: str) -> str:
    """One text file of a verified folder."""
    try:
        with _reading(folder / name):
            return (folder / name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Damaged(f"{name} cannot be read: {error}") from None


def read_json(folder: Path, name: str) -> Any:
    """One JSON file of a verified folder."""
    try:
        return json.loads(read_text(folder, name))
    except ValueError as error:
        if isinstance(error, Refusal):
            raise
        raise Damaged(f"{name} cannot be read: {error}") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    manifest = read_json(folder, MANIFEST)
    if not isinstance(manifest, dict) or "digest" not in manifest:
        raise Damaged(f"{MANIFEST} is not a manifest")
    if manifest["digest"] != (digest := _digest(manifest)):
        raise Damaged(f"{MANIFEST} has digest {digest[:16]}…, it says {str(manifest['digest'])[:16]}…")
    if manifest["format"] != FORMAT:
        raise Damaged(f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}")
    return manifest


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tell what is damage (the file is gone) from what says nothing about the file (the machine cannot read it)."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError):
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Refusal(
            f"{path}: cannot be read: {error.strerror or error}; nothing was loaded and nothing removed. Mend that and "
            f"start the same command again, or move {path.parent.name} away to go on from the checkpoint before it"
        ) from None


def _whole(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[str, str]]:
    """Tensors as a file can hold them, and which names stand for another's memory (tied weights): name -> name kept."""
    kept: Tensors = {}
    tied: dict[str, str] = {}
    first_at: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first_at:
            tied[name] = first_at[place]
            continue
        first_at[place] = name
        tensor = tensor.detach().cpu().contiguous()
        # A view of a larger storage would drag its neighbours along, and safetensors refuses shared memory.
        owns_storage = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        kept[name] = tensor if owns_storage else tensor.clone()
    return kept, tied


def _digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _shape_of(tensor: torch.Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(partial: Path, target: Path) -> None:
    replaced = target.with_name(f".replaced_{target.name}")
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    _to_disk(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
