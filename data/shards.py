"""Token files in Megatron-LM's `.bin`/`.idx` format: tokens end to end, and an index of documents beside them."""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from settings import Refusal

MAGIC = b"MMIDIDX\x00\x00"
HEAD = struct.Struct("<9sQBQQ")
CODES: dict[int, np.dtype] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}


@dataclass(frozen=True)
class FileDigest:
    """What a file must be: its size in bytes and the sha256 of its bytes."""

    size: int
    sha256: str


def token_dtype(vocab_size: int) -> np.dtype:
    """Two bytes a token where ids fit, else four (Megatron-LM's own border)."""
    return CODES[8] if vocab_size < 65_500 else CODES[4]


class ShardWriter:
    """Writes documents to `<prefix>.bin` as they come and `<prefix>.idx` when closed; digests are ready then."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = token_dtype(vocab_size)
        self.lengths: list[int] = []
        self.digests: dict[str, FileDigest] = {}
        self._hash = hashlib.sha256()
        self._file = bin_of(prefix).open("wb")

    def add(self, tokens: np.ndarray, end: int | None = None) -> None:
        """Append one document's tokens (N,), and the token `end` behind them where it is given."""
        tail = [] if end is None else [end]
        for part in (tokens, tail):
            data = np.ascontiguousarray(part, dtype=self.dtype).tobytes()
            self._file.write(data)
            self._hash.update(data)
        self.lengths.append(len(tokens) + len(tail))

    def close(self) -> None:
        self._file.close()
        count, itemsize = len(self.lengths), self.dtype.itemsize
        lengths = np.array(self.lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * itemsize
        code = next(code for code, dtype in CODES.items() if dtype == self.dtype)
        index = HEAD.pack(MAGIC, 1, code, count, count + 1) + lengths.tobytes()
        index += (ends - lengths * np.int64(itemsize)).tobytes() + np.arange(count + 1, dtype="<i8").tobytes()
        idx_of(self.prefix).write_bytes(index)
        self.digests = {
            "bin": FileDigest(int(ends[-1]) if count else 0, self._hash.hexdigest()),
            "idx": FileDigest(len(index), hashlib.sha256(index).hexdigest()),
        }

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close() if kind is None else self._file.close()


class Shard:
    """Documents of one `.bin`/`.idx` pair, memory-mapped: nothing is read before it is asked for.

    tokens: every token, documents end to end; offsets: (num_documents + 1,) int64 places in it.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        dtype, self.lengths = _read_index(idx_of(prefix))
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self.tokens = _map_tokens(bin_of(prefix), dtype, int(self.offsets[-1]))

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    def check_ids(self, vocab_size: int) -> None:
        """Refuse ids that the vocabulary does not have; reads all tokens."""
        lowest, highest = int(self.tokens.min(initial=0)), int(self.tokens.max(initial=0))
        if lowest < 0 or highest >= vocab_size:
            odd = lowest if lowest < 0 else highest
            where = bin_of(self.prefix)
            raise Refusal(f"{where}: has id {odd} in a vocabulary of {vocab_size}; {anew(where.parent)}")

    def document(self, number: int) -> np.ndarray:
        """All tokens of one document."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def slice(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of one document."""
        return self.document(document)[start:stop]

    @property
    def fingerprint(self) -> str:
        """sha256 over the digests of both files; reads them whole."""
        return hashlib.sha256(
            "".join(digest(path).sha256 for path in files_of(self.prefix).values()).encode()
        ).hexdigest()


def bin_of(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_of(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def files_of(prefix: Path) -> dict[str, Path]:
    return {"bin": bin_of(prefix), "idx": idx_of(prefix)}


def anew(folder: Path) -> str:
    """The way out where a prepared folder cannot be used: `prepare` keeps a folder that is there."""
    return f"remove {folder} and prepare it anew"


def digest(path: Path) -> FileDigest:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return FileDigest(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def check_file(path: Path, expected: FileDigest, read_whole: bool) -> None:
    """Refuse a file that is missing or is not the one that its manifest describes."""
    if not path.is_file():
        raise Refusal(f"{path}: is missing although its manifest names it; {anew(path.parent)}")
    size = path.stat().st_size
    if size != expected.size:
        raise Refusal(f"{path}: has {size} bytes, its manifest says {expected.size}; {anew(path.parent)}")
    found = digest(path).sha256 if read_whole else expected.sha256
    if found != expected.sha256:
        raise Refusal(
            f"{path}: was changed after it was prepared (sha256 {found[:12]}..., its manifest says "
            f"{expected.sha256[:12]}...); restore it, or {anew(path.parent)}"
        )


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    if not path.is_file():  # a pipe would be waited for
        raise Refusal(f"{path}: no such index; prepare the folder with `python -m data prepare`")
    data = path.read_bytes()
    if len(data) < HEAD.size or not data.startswith(MAGIC):
        raise Refusal(f"{path}: is not an index of token shards (it should begin with MMIDIDX)")
    _, version, code, count, _ = HEAD.unpack_from(data)
    if version != 1 or code not in CODES or len(data) < HEAD.size + 4 * count:
        raise Refusal(
            f"{path}: version {version}, dtype code {code}, {count} documents cannot be read; {anew(path.parent)}"
        )
    lengths = np.frombuffer(data, dtype="<i4", count=count, offset=HEAD.size).astype(np.int64)
    if lengths.min(initial=0) < 0:
        raise Refusal(f"{path}: document {int(lengths.argmin())} has {lengths.min()} tokens; {anew(path.parent)}")
    return CODES[code], lengths


def _map_tokens(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if not path.is_file():
        raise Refusal(f"{path}: no such token file; prepare the folder with `python -m data prepare`")
    if path.stat().st_size != count * dtype.itemsize:
        raise Refusal(
            f"{path}: has {path.stat().st_size} bytes, its index says {count * dtype.itemsize}; {anew(path.parent)}"
        )
    # An empty file cannot be mapped. asarray: plain arrays index faster than np.memmap.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if count else np.zeros(0, dtype=dtype)
