"""safetensors files: written tensor by tensor as they come and digested on the way, and read back in parts.

A file is eight bytes with the length of its header, a JSON header with dtype, shape and place of every tensor, and the
tensors' bytes one after another (https://huggingface.co/docs/safetensors). Reading is left to the library, which
checks the header and runs nothing.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint.fingerprint import bytes_of, fingerprints, has_experts
from parallel.layout import Index

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls them."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}
BLOCK_BYTES = 1 << 24
Outline = dict[str, Any]
"""{"dtype": "float32", "shape": [2, 3]}, as a manifest has it."""


@dataclass
class WrittenFile:
    """What a manifest says of one file."""

    name: str
    bytes: int
    sha256: str
    tensors: dict[str, Outline] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    """Names that stand for another's tensor: name -> the one in the file."""
    experts: dict[str, list[str]] = field(default_factory=dict)
    """Fingerprints, by tensor."""


class NoTensorFile(Exception):
    """A file is not safetensors."""


def outline_of(tensor: Tensor) -> Outline:
    return outline(tensor.dtype, tensor.shape)


def outline(dtype: torch.dtype, shape: Iterable[int]) -> Outline:
    return {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}


def write_tensor_file(
    path: Path, outlines: Mapping[str, Outline], tensors: Iterable[tuple[str, Tensor]]
) -> WrittenFile:
    """Write tensors as they come, in the order of their outlines, and flush them to the disk.

    tensors: on the CPU, as their outlines say; no two of them are in memory at once on account of this. Raises OSError.
    """
    header, place = {}, 0
    for name, facts in outlines.items():
        dtype = getattr(torch, facts["dtype"])
        size = math.prod(facts["shape"]) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": facts["shape"], "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), WrittenFile(path.name, 0, "", dict(outlines))
    expected = iter(outlines.items())
    with path.open("wb", buffering=0) as file:
        for block in (len(text).to_bytes(8, "little"), text):
            _put(file, digest, memoryview(block))
        for name, tensor in tensors:
            assert (name, outline_of(tensor)) == next(expected), f"{name} is not what comes next in {path.name}"
            content = bytes_of(tensor)
            for start in range(0, len(content), BLOCK_BYTES):
                _put(file, digest, content[start : start + BLOCK_BYTES])
            if has_experts(name) and tensor.ndim:
                written.experts[name] = fingerprints(tensor)
        os.fsync(file.fileno())
        written.bytes = file.tell()
    assert written.bytes == 8 + len(text) + place, f"{path.name} lacks tensors"
    written.sha256 = digest.hexdigest()
    return written


def _put(file: Any, digest: Any, block: memoryview) -> None:
    digest.update(block)
    while block:
        block = block[file.write(block) :]


class TensorFile:
    """A safetensors file, open for reading: `with TensorFile(path) as file`. Raises NoTensorFile and OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "TensorFile":
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu").__enter__()
            self.outlines = {name: self._outline(name) for name in self._file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise NoTensorFile(f"{self.path.name} is not a safetensors file: {error}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def whole(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def part(self, name: str, index: Index) -> Tensor:
        """What of a tensor an index takes, reading little more than that; see `Layout.index`."""
        if all(entry == slice(None) for entry in index if isinstance(entry, slice)) and not _numbers(index):
            return self.whole(name)
        part = self._file.get_slice(name)[tuple(_stretch(entry) for entry in index)]
        for dim, numbers in _numbers(index):
            part = part.index_select(dim, numbers - numbers.min())
        return part

    def _outline(self, name: str) -> Outline:
        facts = self._file.get_slice(name)
        dtype = DTYPES.get(facts.get_dtype())
        return {"dtype": facts.get_dtype(), "shape": []} if dtype is None else outline(dtype, facts.get_shape())


def _numbers(index: Index) -> list[tuple[int, Tensor]]:
    return [(dim, entry) for dim, entry in enumerate(index) if isinstance(entry, Tensor)]


def _stretch(entry: slice | Tensor) -> slice:
    """The stretch in which all that is taken lies."""
    return entry if isinstance(entry, slice) else slice(int(entry.min()), int(entry.max()) + 1)
