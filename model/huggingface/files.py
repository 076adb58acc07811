"""Folders of safetensors and JSON: nothing else is opened, so that reading one cannot run code that somebody put there.

Weights may be one file or several with an index (model.safetensors.index.json), as transformers writes them.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.huggingface.keys import Keys
from settings import Refusal, Table, validate

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SHARD_BYTES = 5 * 10**9
"""Weights are cut into files of at most so many bytes; a tensor is never cut."""
FLOATS = ("F32", "F16", "BF16", "F64")


class Weights:
    """The tensors of a folder: names and shapes from the files' headers, values when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises Refusal where there are no safetensors, or where a file is damaged, missing, or of low precision."""
        self.folder = folder
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, torch.Size] = {}
        index = _index_of(folder)
        for file in dict.fromkeys(index.values()) if index else [WEIGHTS]:
            with _opened(folder / file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    header = tensors.get_slice(name)
                    if header.get_dtype() not in FLOATS:
                        raise Refusal(f"{folder / file}: {name} is {header.get_dtype()}; only floats are read")
                    self._file_of[name], self.shapes[name] = file, torch.Size(header.get_shape())
        lost = sorted(name for name, file in index.items() if self._file_of.get(name) != file)
        if lost:
            raise Refusal(f"{folder / INDEX}: names tensors that are not where it says: {', '.join(lost[:5])}")

    def read(self, name: str) -> Tensor:
        """One tensor in fp32, on the CPU; raises Refusal where a number of it is NaN or infinite."""
        path = self.folder / self._file_of[name]
        with _opened(path) as tensors:
            tensor = tensors.get_tensor(name).float()
        if not tensor.isfinite().all():
            raise Refusal(f"{path}: {name} holds numbers that are NaN or infinite; take another copy of these weights")
        return tensor


def read_config(folder: Path) -> Table:
    """config.json of a folder, with every key of the type that it has; raises Refusal naming those that are not."""
    if not folder.is_dir():
        raise Refusal(f"{folder}: no such folder; give one that holds config.json and {WEIGHTS}")
    config = read_json(folder / "config.json")
    validate(config, Keys, str(folder / "config.json"))
    return config


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Put the folder before what a refusal says of its config.json."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal("\n".join(f"{folder}: {line}" for line in str(refusal).splitlines())) from None


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, most: int) -> None:
    """Write tensors into files of at most `most` bytes each, with an index where they are several.

    A file's tensors are in memory at one time, no more.
    """
    shards: list[Path] = []
    file_of: dict[str, Path] = {}
    total = 0
    for shard in _shards(tensors, dtype, most):
        shards.append(folder / f"shard-{len(shards)}")
        save_file(shard, shards[-1], metadata={"format": "pt"})
        file_of |= dict.fromkeys(shard, shards[-1])
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        shards[0].rename(folder / WEIGHTS)
        return
    names = {path: f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n, path in enumerate(shards, start=1)}
    for path, name in names.items():
        path.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[path] for name, path in file_of.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A folder to write in that becomes `target` when all is written; after an error nothing is left of it."""
    target = target.resolve()  # of `.` there is no name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Refusal(f"{target}: is already there; remove it, or name another folder")
    partial = target.with_name(f".partial_{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _shards(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, most: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * dtype.itemsize
        if shard and size + num_bytes > most:
            yield shard
            shard, size = {}, 0
        # Copied: a view would drag all experts along, and safetensors refuses shared memory.
        shard[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if not shard[name].isfinite().all() and tensor.isfinite().all():
            raise Refusal(
                f"--dtype {str(dtype).removeprefix('torch.')}: {name} has a number of {float(tensor.abs().max()):.4g}, "
                f"and the largest there is {torch.finfo(dtype).max:.3g}; take float32 or bfloat16"
            )
        size += num_bytes
    yield shard


def _index_of(folder: Path) -> Mapping[str, str]:
    """Which file each tensor is in; empty where one file has them all."""
    if (folder / INDEX).is_file():
        table = read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
            raise Refusal(f"{folder / INDEX}: has no weight_map from tensors to files")
        outside = sorted(
            {file for file in table.values() if Path(file).name != file or not file.endswith(".safetensors")}
        )
        if outside:
            raise Refusal(f"{folder / INDEX}: names {outside[0]!r}, which is no safetensors file of this folder")
        return table
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        found = f"only {', '.join(pickled[:3])}, and reading a pickle can run code" if pickled else "no weights"
        raise Refusal(
            f"{folder}: holds {found}; give a folder with {WEIGHTS} (transformers: save_pretrained writes it)"
        )
    return {}


def read_json(path: Path) -> Table:
    """A JSON object; raises Refusal where the file is none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"{path}: no such file; give a folder that transformers has written") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{path}: cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise Refusal(f"{path}: is no JSON object")
    return table


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise Refusal(f"{path}: is not a whole safetensors file: {error}") from None
    except OSError as error:
        raise Refusal(f"{path}: cannot be read: {error}") from None
