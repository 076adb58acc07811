"""Where documents come from: the Python source code that every machine has, or text files of one's own."""

import difflib
import gzip
import hashlib
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from settings import Refusal, nearest

# Folders of the standard library that other people's packages, tests or caches may live in.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """UTF-8 text; documents of one package are held out together."""

    name: str
    package: str
    text: bytes


class Documents(Protocol):
    """Documents that can be gone through more than once, always in the same order."""

    description: str
    licence: str
    recipe: str
    """sha256 that changes when the files do; cheap to compute: nothing is read."""

    def __iter__(self) -> Iterator[Document]: ...


def local_python() -> "PythonDocuments":
    """The standard library without its tests, and installed torch: about 30 MB of code, no download."""
    return PythonDocuments(Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent)


class PythonDocuments:
    """Python source, the files of one package joined in path order into one long document.

    A package is a folder at the top of the standard library, or a folder at the top of torch; loose files stand alone.
    Exact duplicates of a file and files that are not UTF-8 are left out.
    """

    licence = "PSF-2.0 (standard library), BSD-3-Clause (torch)"

    def __init__(self, library: Path, torch_folder: Path) -> None:
        self.description = f"source code of Python {platform.python_version()} and torch {torch.__version__}"
        self._documents: list[Document] | None = None
        self._groups: dict[str, list[Path]] = {}
        for root, prefix in ((library, ""), (torch_folder, "torch/")):
            for path in _python_files(root):
                parts = path.relative_to(root).parts
                self._groups.setdefault(prefix + parts[0], []).append(path)
        if not self._groups:
            raise Refusal(f"{library} and {torch_folder} hold no .py files; use a text source instead")
        listed = (
            f"{name}\t{path.name}\t{path.stat().st_size}" for name, paths in self._groups.items() for path in paths
        )
        self.recipe = hashlib.sha256("\n".join([self.description, *listed]).encode()).hexdigest()

    def __iter__(self) -> Iterator[Document]:
        if self._documents is None:
            # Kept: thousands of small files take longer to open than tens of megabytes take to hold.
            seen: set[bytes] = set()
            joined = {name: _joined(paths, seen) for name, paths in self._groups.items()}
            self._documents = [Document(name, name, text) for name, text in joined.items() if text]
        return iter(self._documents)


def text_documents(path: Path | str) -> "TextDocuments":
    """Documents of a text file, a JSONL file, a Parquet file, or a folder of them (looked through to any depth)."""
    return TextDocuments(Path(path))


class TextDocuments:
    """One document a .txt or .md file, one a line's "text" in .jsonl(.gz), one a row's "text" in .parquet.

    Raises Refusal for what is missing, empty, or not UTF-8 (naming file and byte).
    """

    licence = "unknown"

    def __init__(self, path: Path) -> None:
        if not path.exists():
            siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
            close = difflib.get_close_matches(path.name, siblings, n=1)
            raise Refusal(f"{path}: no such file or folder" + (f"; did you mean {close[0]!r}?" if close else ""))
        self.root = path if path.is_dir() else path.parent
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        self.files = [file for file in found if _reader(file) is not None]
        if not self.files:
            raise Refusal(f"{path}: holds no text that can be read; known kinds of file: {', '.join(READERS)}")
        self.description = str(path)
        listed = (f"{self._name(file)}\t{file.stat().st_size}\t{file.stat().st_mtime_ns}" for file in self.files)
        self.recipe = hashlib.sha256("\n".join([str(path.resolve()), *listed]).encode()).hexdigest()

    def __iter__(self) -> Iterator[Document]:
        is_empty = True
        for file in self.files:
            reader = _reader(file)
            assert reader is not None
            for number, text in reader(file):
                if text.strip():
                    is_empty = False
                    name = self._name(file) + (f":{number}" if number else "")
                    yield Document(name, name, text)
        if is_empty:
            raise Refusal(f"{self.description}: is empty; give text to train on")

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()


def _plain(file: Path) -> Iterator[tuple[int, bytes]]:
    yield 0, _checked_utf8(file.read_bytes(), file, 0)


def _json_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    for number, line in enumerate(_lines(file), start=1):
        _checked_utf8(line, file, offset)
        offset += len(line)
        if line.strip():
            yield number, _text_of(line, file, number)


def _lines(file: Path) -> Iterator[bytes]:
    if file.suffix.lower() != ".gz":
        with file.open("rb") as lines:
            yield from lines
        return
    try:
        with gzip.open(file, "rb") as lines:
            yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Refusal(f"{file}: is not gzip, or cut short ({error}); compress or copy it again") from None


def _parquet(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise Refusal(f"{file}: Parquet needs the pyarrow package; pip install pyarrow, or give JSONL") from None
    try:
        table = parquet.ParquetFile(file)
    except (ValueError, OSError) as error:
        raise Refusal(f"{file}: is not Parquet, or damaged ({error}); copy it again") from None
    if "text" not in table.schema_arrow.names:
        raise Refusal(f"{file}: has no column 'text'{nearest('text', table.schema_arrow.names)}")
    number = 0
    for batch in table.iter_batches(columns=["text"]):
        for text in batch.column(0).to_pylist():
            number += 1
            if not isinstance(text, str | None):
                raise Refusal(f"{file}: row {number}: 'text' must be a string, it is {type(text).__name__}; convert it")
            yield number, (text or "").encode()


Reader = Callable[[Path], Iterable[tuple[int, bytes]]]
READERS: dict[str, Reader] = {
    ".txt": _plain,
    ".md": _plain,
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".parquet": _parquet,
}


def _reader(file: Path) -> Reader | None:
    return next((reader for ending, reader in READERS.items() if file.name.lower().endswith(ending)), None)


def _checked_utf8(text: bytes, file: Path, offset: int) -> bytes:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(
            f"{file}: not UTF-8 at byte {offset + error.start} (0x{text[error.start]:02x}); save it as UTF-8"
        ) from None
    return text


def _text_of(line: bytes, file: Path, number: int) -> bytes:
    try:
        text = json.loads(line)["text"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise Refusal(f'{file}: line {number} is not an object with a "text" ({error})') from None
    if not isinstance(text, str):
        raise Refusal(f'{file}: line {number}: "text" must be a string, it is {type(text).__name__}')
    return text.encode("utf-8", errors="replace")


def _python_files(root: Path) -> list[Path]:
    """The .py files below root in path order, without tests, caches and what others installed there."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _joined(paths: list[Path], seen: set[bytes]) -> bytes:
    """The files one after another, each ending with a line end."""
    texts = [text for path in paths if (text := _new_text(path, seen))]
    return b"".join(text if text.endswith(b"\n") else text + b"\n" for text in texts)


def _new_text(path: Path, seen: set[bytes]) -> bytes:
    """The file's text, or nothing if it is a duplicate, is not UTF-8 or cannot be read."""
    try:
        text = path.read_bytes()
        text.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return b""
    key = hashlib.sha256(text).digest()
    if key in seen:
        return b""
    seen.add(key)
    return text
