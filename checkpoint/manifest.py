"""A manifest: what a folder of files holds, and the doubt with which it and other small files are read.

Nothing is believed that a file says of others before it is checked: names stay inside the folder, no link is followed,
and numbers are numbers.
"""

import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints, ValidationError

from checkpoint.tensor_file import Outline, WrittenFile
from settings import Refusal

MANIFEST = "manifest.json"
FORMATS = (1, 2)
"""2: some file of tensors is cut into several."""
MOST_TEXT = 1 << 30
"""Bytes of the longest text that is read."""
Manifest = dict[str, Any]
Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16,64}$")]


class Damaged(Exception):
    """A file of a sealed folder is not what was written; the message names the file and the difference."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _File(_Strict):
    bytes: NonNegativeInt
    sha256: Hex


class _Tensor(_Strict):
    dtype: str
    shape: list[NonNegativeInt]


class _Manifest(_Strict):
    """The shape of a manifest; what else stands in it are facts about the folder."""

    format: int
    files: dict[str, _File]
    tensors: dict[str, dict[str, _Tensor]]
    tied: dict[str, dict[str, str]]
    experts: dict[str, dict[str, list[Hex]]] = Field(default={})


def manifest_text(written: Sequence[WrittenFile], facts: Mapping[str, Any]) -> str:
    """The manifest of files that were written, as JSON."""
    with_tensors = [file for file in written if file.name.endswith(".safetensors")]
    manifest: Manifest = {
        "format": 2 if any(_CUT.match(file.name) for file in with_tensors) else 1,
        **facts,
        "files": {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in written},
        "tensors": {file.name: file.tensors for file in with_tensors},
        "tied": {file.name: file.tied for file in with_tensors},
        "experts": {file.name: file.experts for file in with_tensors if file.experts},
    }
    manifest["digest"] = digest_of(manifest)
    return json.dumps(manifest, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; raises Damaged where it is none, altered, or names what no folder holds."""
    manifest = read_json(folder, MANIFEST)
    if not isinstance(manifest, dict) or "digest" not in manifest:
        raise Damaged(f"{MANIFEST} is not a manifest")
    try:
        digest = digest_of(manifest)
    except RecursionError:
        raise Damaged(f"{MANIFEST} is too deep to be one") from None
    if manifest["digest"] != digest:
        raise Damaged(f"{MANIFEST} has digest {digest[:16]}…, it says {str(manifest['digest'])[:16]}…")
    if manifest.get("format") not in FORMATS:
        raise Damaged(f"{MANIFEST} has format {manifest.get('format')}, this version reads {FORMATS[-1]} and before")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    for name in manifest["files"]:
        if name != Path(name).name or name in ("", "..", MANIFEST) or set(name) & set("\\\0"):
            raise Damaged(f"{MANIFEST} names {name!r}, which is no file of this folder")
    for name, tensors in manifest["tensors"].items():
        strange = [f"{a} tied to {k}" for a, k in manifest["tied"].get(name, {}).items() if k not in tensors]
        if name not in manifest["files"] or strange:
            raise Damaged(f"{MANIFEST}: {name} is {strange[0] if strange else 'no file of it'}")
    return manifest


_CUT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)\Z")


def cut_name(name: str, number: int, count: int) -> str:
    """The name of one of the files that a file is cut into; number: from 0."""
    path = Path(name)
    return name if count == 1 else f"{path.stem}-{number + 1:05d}-of-{count:05d}{path.suffix}"


def tensor_files(manifest: Manifest, name: str) -> list[str]:
    """The files of tensors that make up the one of this name; raises Damaged where one of them is missing."""
    if name in manifest["tensors"]:
        return [name]
    found = {match[0]: match for match in map(_CUT.match, manifest["tensors"]) if match}
    parts = sorted(key for key, match in found.items() if match["stem"] + match["suffix"] == name)
    count = int(found[parts[0]]["count"]) if parts else 1
    expected = [cut_name(name, number, count) for number in range(min(count, len(parts) + 1))]
    if parts != expected:
        raise Damaged(f"{next(key for key in expected if key not in parts)} is missing")
    return parts


def outlines_of(manifest: Manifest, name: str) -> dict[str, Outline]:
    """Every tensor of a file, or of those that it was cut into, tied ones under each of their names."""
    files = tensor_files(manifest, name)
    outlines = {key: facts for file in files for key, facts in manifest["tensors"][file].items()}
    return outlines | {alias: outlines[kept] for alias, kept in ties_of(manifest, name).items()}


def ties_of(manifest: Manifest, name: str) -> dict[str, str]:
    """Names that stand for another's tensor, in the same files: name -> the one that is there."""
    files = tensor_files(manifest, name)
    return {alias: kept for file in files for alias, kept in manifest["tied"].get(file, {}).items()}


def read_text(folder: Path, name: str) -> str:
    """One text file of a verified folder."""
    path = folder / name
    try:
        with reading(path):
            if path.stat().st_size > MOST_TEXT:
                raise Damaged(f"{name} holds {path.stat().st_size} bytes, too many to be one")
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Damaged(f"{name} cannot be read: {error}") from None


def read_json(folder: Path, name: str) -> Any:
    """One JSON file of a verified folder."""
    text = read_text(folder, name)
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} cannot be read: {error}") from None


def digest_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all of a manifest but its digest."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell what is damage (the file is gone) from what says nothing about the file (the machine cannot read it)."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Damaged(f"{path.name} is missing: what has its name is no file of its own")
        yield
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Refusal(
            f"{path}: cannot be read: {error.strerror or error}; nothing was loaded and nothing removed. Mend that and "
            f"start the same command again, or move {path.parent.name} away to go on from the checkpoint before it"
        ) from None


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")
