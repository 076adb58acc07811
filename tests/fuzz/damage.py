"""Damage to the files of a folder, whatever they are: what disks, copies, editors and other tools do to them.

Files are found by listing; what is inside is changed by kind. `reseal` writes down the digests of what is there then,
as somebody would who meant it, so that what lies behind the digests is reached.
"""

import copy
import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tomli_w
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from checkpoint.fingerprint import fingerprints, has_experts
from checkpoint.manifest import digest_of
from checkpoint.tensor_file import outline_of
from data.shards import HEAD, MAGIC
from tests.fuzz.mutations import NUMBERS, OTHERS, STRINGS, at, places, put

Damage = Callable[[Path, Random], str]


def files_below(folder: Path) -> list[Path]:
    """All files, in an order that does not depend on the disk."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def damage(path: Path, rng: Random, *, is_meant: bool = False) -> str:
    """Change one file; is_meant: in a way that its kind can be changed in, as somebody would who knows it."""
    own = INSIDE.get(path.suffix, [])
    try:
        return f"{path.name}: " + rng.choice(own if own and is_meant else [*own, *own, *ANY])(path, rng)
    except (ValueError, KeyError, IndexError, TypeError, SafetensorError, OSError):  # not what its name says any more
        return f"{path.name}: " + cut(path, rng)


# ------------------------------------------------------------------------------------------------- any file


def cut(path: Path, rng: Random) -> str:
    data = path.read_bytes()
    place = rng.choice(
        [0, 1, 7, 8, 9, 16, 32, 34, 64, len(data) // 2, max(len(data) - 1, 0), rng.randrange(len(data) + 1)]
    )
    path.write_bytes(data[:place])
    return f"cut to {min(place, len(data))} bytes"


def flip(path: Path, rng: Random) -> str:
    data = bytearray(path.read_bytes() or b"\0")
    spots = [rng.randrange(min(rng.choice([8, 40, 200, len(data)]), len(data))) for _ in range(rng.choice([1, 1, 4]))]
    for spot in spots:
        data[spot] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))
    return f"bits flipped at {spots}"


def lengthen(path: Path, rng: Random) -> str:
    path.write_bytes(path.read_bytes() + rng.choice([b"\0", b"\n", b" ", b"}", b"\0" * 4096, bytes(range(256))]))
    return "longer"


def blank(path: Path, rng: Random) -> str:
    path.write_bytes(b"\0" * path.stat().st_size)
    return "zeros, as a power cut leaves"


def take_another(path: Path, rng: Random) -> str:
    others = [other for other in files_below(path.parents[1]) if other != path]
    alike = [other for other in others if other.name == path.name] or others
    chosen = rng.choice(rng.choice([others, alike]))
    shutil.copyfile(chosen, path)
    return f"another file, {chosen.parent.name}/{chosen.name}"


def remove(path: Path, rng: Random) -> str:
    path.unlink()
    return "removed"


def folder_instead(path: Path, rng: Random) -> str:
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "x").write_text("x")
    return "a folder"


def link_instead(path: Path, rng: Random) -> str:
    target = rng.choice(
        [path.name, "nowhere", "/dev/zero", "/dev/null", "..", str(rng.choice(files_below(path.parent)))]
    )
    path.unlink()
    path.symlink_to(target)
    return f"a link to {target}"


def pipe_instead(path: Path, rng: Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a pipe"


def rename(path: Path, rng: Random) -> str:
    name = rng.choice([path.name.upper(), path.name + ".bak", f".{path.name}", "x"])
    path.rename(path.with_name(name))
    return f"called {name}"


def beside(path: Path, rng: Random) -> str:
    name = rng.choice(
        ["x", "step_00000099", "step_x", "model-00001-of-00002.safetensors", ".DS_Store", "train.bin.partial"]
    )
    path.with_name(name).write_bytes(rng.choice([b"", b"x", path.read_bytes()]))
    return f"{name} beside it"


ANY: list[Damage] = [
    cut, cut, flip, flip, lengthen, blank, take_another, remove, folder_instead, link_instead, pipe_instead, rename,
    beside,
]  # fmt: skip


# ------------------------------------------------------------------------------------------------- JSON and TOML


def of_json(path: Path, rng: Random) -> str:
    table = json.loads(path.read_text())
    done = odd(table, rng)
    path.write_text(json.dumps(table, default=str, indent=1))
    return done


def of_toml(path: Path, rng: Random) -> str:
    table = tomllib.loads(path.read_text())
    done = odd(table, rng)
    path.write_text(tomli_w.dumps(table))
    return done


def of_lines(path: Path, rng: Random) -> str:
    """A row that is changed, or not where it was."""
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            lines.insert(rng.randrange(len(lines)), lines[number])
            done = "twice"
        case 1:
            lines[number] = rng.choice(
                ["", "{}", "[]", "null", "1", "\x00" * 40, lines[number][:-5], '"step"', "NaN", "[" * 2000]
            )
            done = f"{lines[number][:20]!r}"
        case 2:
            rng.shuffle(lines)
            done = "shuffled"
        case _:
            row = json.loads(lines[number])
            done = odd(row, rng)
            lines[number] = json.dumps(row, default=str)
    path.write_text("".join(line + "\n" for line in lines))
    return f"line {number + 1} {done}"


def odd(table: Any, rng: Random) -> str:
    """One value that is none, another's, left out or new; in place."""
    path = rng.choice(list(places(table)))
    match rng.randrange(6):
        case 0:
            at(table, path[:-1]).pop(path[-1])
            return f"{path} left out"
        case 1:
            value = copy.deepcopy(at(table, rng.choice(list(places(table)))))
        case 2:
            path, value = (*path[:-1], rng.choice(["x", 0]) if isinstance(at(table, path[:-1]), dict) else path[-1]), 1
        case _:
            value = rng.choice([*NUMBERS, *OTHERS, *STRINGS[:20], "../../x", "/etc/passwd", "é" * 300])
    if value is None or (isinstance(value, list) and None in value):
        value = "null"
    put(table, path, value)
    return f"{path} = {str(value)[:40]!r}"


# ------------------------------------------------------------------------------------------------- tensors


def of_tensors(path: Path, rng: Random) -> str:
    """A tensor of another shape, kind, name or content; experts in another order."""
    tensors = load_file(path)
    names = sorted(tensors)
    stacked = [name for name in names if has_experts(name)]
    name, other = rng.choice(rng.choice([names, stacked or names])), rng.choice(names)
    tensor = tensors[name].clone()
    match rng.randrange(9):
        case 0:
            tensors.pop(name)
            done = "left out"
        case 1:
            tensors[name + "x"] = tensors.pop(name)
            done = "renamed"
        case 2:
            tensors[name] = tensor.flatten()[: max(tensor.numel() - 1, 0)]
            done = "shorter"
        case 3:
            tensors[name] = tensor.to(rng.choice([torch.float16, torch.int8, torch.float64, torch.bool]))
            done = "of another dtype"
        case 4:
            tensors[name] = torch.full_like(tensor, float("nan"))
            done = "not numbers"
        case 5:
            tensors[name], tensors[other] = tensors[other].clone(), tensor
            done = f"in the place of {other}"
        case 6 if tensor.ndim and len(tensor) > 1:
            tensors[name] = tensor.roll(1, 0)
            done = "rolled along its first dimension"
        case 7:
            tensors[name] = tensor.reshape(1, *tensor.shape)
            done = "of one dimension more"
        case _:
            tensors[name] = tensor[None].repeat(2, *([1] * tensor.ndim)).flatten(0, min(1, tensor.ndim))
            done = "twice as long"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return f"{name} {done}"


def of_header(path: Path, rng: Random) -> str:
    """The header of safetensors says something else of the same bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    done = odd(header, rng)
    text = json.dumps(header, default=str).encode()
    size = rng.choice([len(text)] * 4 + [0, 1, 2**40, 2**63, len(text) - 1])
    path.write_bytes(size.to_bytes(8, "little") + text + data[8 + length :])
    return f"header {done}"


# ------------------------------------------------------------------------------------------------- shards


def of_index(path: Path, rng: Random) -> str:
    """Numbers of an index: its head, the lengths of documents, where they lie."""
    data = bytearray(path.read_bytes())
    head = list(HEAD.unpack_from(data))
    huge = [0, 1, 2, 3, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1]
    if rng.random() < 0.5:
        field = rng.randrange(1, 5)
        head[field] = rng.choice(huge) if field != 2 else rng.choice([0, 1, 4, 5, 8, 9, 255])
        head[1] %= 2**64
        data[: HEAD.size] = HEAD.pack(MAGIC, *head[1:])
        done = f"head {head[1:]}"
    else:
        count = head[3]
        lengths = np.frombuffer(bytes(data), dtype="<i4", count=count, offset=HEAD.size).copy()
        which = rng.randrange(count)
        lengths[which] = rng.choice([0, -1, 1, -(2**31), 2**31 - 1, int(lengths[which]) + 1, int(lengths[which]) - 1])
        if count > 1 and rng.random() < 0.5:  # the sum stays
            lengths[which - 1] -= lengths[which] - np.frombuffer(bytes(data), "<i4", count, HEAD.size)[which]
        data[HEAD.size : HEAD.size + 4 * count] = lengths.tobytes()
        done = f"document {which} of {lengths[which]} tokens"
    path.write_bytes(bytes(data))
    return done


def of_tokens(path: Path, rng: Random) -> str:
    """Ids that no tokenizer of ours has."""
    tokens = np.frombuffer(path.read_bytes(), dtype="<u2").copy()
    start = rng.randrange(max(len(tokens), 1))
    tokens[start : start + rng.choice([1, 100, 10**6])] = rng.choice([257, 300, 32_768, 65_535])
    path.write_bytes(tokens.tobytes())
    return f"ids beyond the vocabulary from {start} on"


INSIDE: dict[str, list[Damage]] = {
    ".json": [of_json, of_json, of_json], ".toml": [of_toml, of_toml], ".jsonl": [of_lines, of_lines],
    ".safetensors": [of_tensors, of_tensors, of_header], ".idx": [of_index, of_index], ".bin": [of_tokens],
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- digests


def reseal_shards(folder: Path) -> None:
    """Write the size and digest of what is there into the manifest of a prepared folder."""
    path = folder / "manifest.json"
    manifest = json.loads(_content(path))
    for split, facts in manifest["splits"].items():
        for kind in facts["files"]:
            data = _content(folder / f"{split}.{kind}")
            facts["files"][kind] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))


def _content(path: Path) -> bytes:
    if not path.is_file() or path.is_symlink():
        raise FileNotFoundError(path)
    return path.read_bytes()


def reseal_checkpoint(folder: Path, is_thorough: bool) -> None:
    """The same for a checkpoint; is_thorough: what the manifest says of tensors and experts is made true as well."""
    path = folder / "manifest.json"
    manifest = json.loads(_content(path))
    for name in manifest["files"]:
        data = _content(folder / name)
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name in manifest["tensors"] if is_thorough else ():
        tensors = load_file(folder / name)
        manifest["tensors"][name] = {key: outline_of(tensor) for key, tensor in tensors.items()}
        stacked = {key: tensor for key, tensor in tensors.items() if has_experts(key) and tensor.ndim}
        manifest["experts"][name] = {key: fingerprints(tensor) for key, tensor in stacked.items()}
    manifest["digest"] = digest_of(manifest)
    path.write_text(json.dumps(manifest))
