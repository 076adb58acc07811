"""A folder of files under one manifest: written beside and renamed, and read back only when every byte is as written.

A manifest (manifest.py) holds the size and the SHA-256 of every file, the dtype and the shape of every tensor, a
fingerprint of every expert, and a digest of itself. Tensors are in safetensors and everything else is JSON or TOML, so
that reading a folder cannot run code that somebody put there.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.fingerprint import OtherExpert, check_experts
from checkpoint.manifest import MANIFEST, Damaged, Manifest, manifest_text, read_manifest, reading, tensor_files
from checkpoint.tensor_file import NoTensorFile, TensorFile, WrittenFile, outline_of, write_tensor_file
from parallel.layout import Index

Tensors = dict[str, Tensor]
Pick = Callable[[str, torch.Size], Index | None]
"""What of a tensor is wanted, by its name and shape; None: nothing."""


def write_sealed(
    target: Path, texts: Mapping[str, str], tensors: Mapping[str, Tensors], facts: Mapping[str, Any]
) -> None:
    """Write files into a partial folder beside `target`, flush them to the disk, and rename: all of it, or nothing.

    texts: file name -> content; tensors: file name -> named tensors, which may be tied or on any device; facts go into
    the manifest as they are. A folder that stood at `target` is replaced. On any error the partial folder is removed.
    """
    partial = begin(target)
    try:
        written = [write_text(partial, name, text) for name, text in texts.items()]
        for name, named in tensors.items():
            kept, tied = untied(named)
            whole = ((key, tensor.detach().cpu()) for key, tensor in kept.items())
            outlines = {key: outline_of(tensor) for key, tensor in kept.items()}
            written.append(replace(write_tensor_file(partial / name, outlines, whole), tied=tied))
        seal(partial, target, written, facts)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def begin(target: Path) -> Path:
    """The partial folder beside `target`, made anew."""
    partial = target.with_name(f".partial_{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def write_text(partial: Path, name: str, text: str) -> WrittenFile:
    """Write one text file and flush it to the disk."""
    content = text.encode()
    with (partial / name).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(name, len(content), hashlib.sha256(content).hexdigest())


def seal(partial: Path, target: Path, written: Sequence[WrittenFile], facts: Mapping[str, Any]) -> None:
    """Put what was written under a manifest and the folder in its place; raises OSError where a file is not there."""
    for file in written:
        if (partial / file.name).stat().st_size != file.bytes:
            raise OSError(f"{partial / file.name} is not as long as what was written")
    write_text(partial, MANIFEST, manifest_text(written, facts))
    _to_disk(partial)
    replaced = target.with_name(f".replaced_{target.name}")
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    _to_disk(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


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


def verify(folder: Path, rank: int = 0, size: int = 1) -> Manifest:
    """The manifest of a folder whose every file is as it was written; raises Damaged naming the first that is not.

    rank, size: of so many ranks that verify together this one takes its share of the files; all of them have to agree.
    Only a missing file and a wrong content are damage. Raises Refusal when a file cannot be read at all: that says
    nothing about what is in it.
    """
    manifest = read_manifest(folder)
    files = manifest["files"]
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name))[rank::size]:
        facts, path = files[name], folder / name
        with reading(path):
            size_found = path.stat().st_size
            digest = sha256(path) if size_found == facts["bytes"] else ""
        if size_found != facts["bytes"]:
            raise Damaged(f"{name} holds {size_found} bytes, the manifest says {facts['bytes']}")
        if digest != facts["sha256"]:
            raise Damaged(f"{name} has SHA-256 {digest[:16]}…, the manifest says {facts['sha256'][:16]}…")
    return manifest


def read_tensors(folder: Path, name: str, manifest: Manifest, pick: Pick | None = None) -> Tensors:
    """The tensors of one file, or of the files that it was cut into, on the CPU, tied ones under each of their names.

    pick: what is wanted of each; left out, everything. Raises Damaged when a file is not safetensors, when it does not
    hold the tensors of the manifest, and when an expert among those read is not the one that was saved.
    """
    tensors: Tensors = {}
    for file_name in tensor_files(manifest, name):
        promised, path = manifest["tensors"][file_name], folder / file_name
        prints = manifest.get("experts", {}).get(file_name, {})
        try:
            with reading(path), TensorFile(path) as file:
                if file.outlines != promised:
                    others = sorted(k for k in {*file.outlines, *promised} if file.outlines.get(k) != promised.get(k))
                    raise Damaged(f"{file_name} does not hold the tensors of the manifest: {', '.join(others[:5])}")
                for key, facts in promised.items():
                    index = pick(key, torch.Size(facts["shape"])) if pick else (slice(None),) * len(facts["shape"])
                    if index is not None:
                        tensors[key] = _read_part(file, key, index, prints.get(key))
        except (NoTensorFile, OtherExpert) as error:
            raise Damaged(str(error)) from None
        for alias, kept in manifest["tied"].get(file_name, {}).items():
            if kept in tensors:
                tensors[alias] = tensors[kept]
    return tensors


def _read_part(file: TensorFile, name: str, index: Index, prints: Sequence[str] | None) -> Tensor:
    """A part of a tensor; of experts, every one that the part has something of is read whole and compared."""
    if prints is None or not index:
        return file.part(name, index)
    which = index[0] if isinstance(index[0], slice) else slice(None)
    experts = file.part(name, (which, *(slice(None) for _ in index[1:])))
    check_experts(name, experts, which.start or 0, prints)
    if which == slice(None) and len(prints) != len(experts):
        raise OtherExpert(f"{name}: holds {len(experts)} experts, {len(prints)} were saved")
    return experts[(slice(None) if index[0] is which else index[0], *index[1:])]


def untied(tensors: Mapping[str, Tensor]) -> tuple[Tensors, dict[str, str]]:
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
        kept[name] = tensor
    return kept, tied


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
