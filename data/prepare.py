"""Documents into a prepared folder: what is left out, what is held out, and the writing of both halves."""

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.containment import Containment
from data.corpus import Document, Documents
from data.prepared import FORMAT, MANIFEST, Manifest, is_empty, read_manifest
from data.shards import ShardWriter
from data.tokenizer import Tokenizer
from settings import Refusal

HELD_OUT_SHARE = 0.03
MOST_HELD_OUT_BYTES = 32 << 20
# Held-out text of which more than this share stands in the training text is thrown away.
MOST_CONTAINED = 0.1


def prepare(documents: Documents, tokenizer: Tokenizer, folder: Path, held_out: float = HELD_OUT_SHARE) -> Manifest:
    """Write the documents as shards in `folder` and return its manifest; a folder made of the same is kept as it is.

    `held_out` is the share of bytes, split by package, that is kept from training (at most 32 MiB). Every stored
    document ends with `end_of_text`. The folder is written beside and renamed: it is whole or it is not there.
    Raises Refusal where nothing is left to hold out.
    """
    manifest, _ = prepare_or_reuse(documents, tokenizer, folder, held_out)
    return manifest


def prepare_or_reuse(
    documents: Documents, tokenizer: Tokenizer, folder: Path, held_out: float = HELD_OUT_SHARE
) -> tuple[Manifest, bool]:
    """`prepare`, and whether it was this process that prepared."""
    if not 0 <= held_out < 1:
        raise Refusal(f"held_out={held_out} must be a share of the text: 0 or more, less than 1")
    recipe = recipe_of(documents, tokenizer, held_out)
    with _locked(folder):
        for stale in folder.parent.glob(f"{glob.escape(folder.name)}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)  # its process is dead, or it would hold the lock
        if folder.exists() and not is_empty(folder):
            return _reused(folder, recipe), False
        beside = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        beside.mkdir(parents=True)
        try:
            manifest = _write(documents, tokenizer, beside, held_out) | {"recipe": recipe}
            (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return manifest, True


def recipe_of(documents: Documents, tokenizer: Tokenizer, held_out: float) -> str:
    """sha256 of everything that decides what `prepare` writes."""
    return hashlib.sha256(f"{FORMAT} {documents.recipe} {tokenizer.fingerprint} {held_out!r}".encode()).hexdigest()


def _reused(folder: Path, recipe: str) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.get("recipe") != recipe:
        raise Refusal(
            f"{folder}: was prepared from other text, another tokenizer or another held-out share "
            f"({manifest.get('source')}); give another folder or remove this one"
        )
    return manifest


@dataclass
class Survey:
    """What one look through the documents finds: which to leave out, and which to hold out."""

    duplicates: set[int] = field(default_factory=set)
    held_out: set[int] = field(default_factory=set)
    cut: tuple[int, int] | None = None
    """(document, byte): this document's text from this byte on is held out."""


def survey(documents: Documents, held_out: float) -> Survey:
    """Choose the held-out documents: whole packages in the order of their names' hashes, as many as fit in the share.

    Where the text is so few documents that not half of the share is reached, the end of the longest is cut off too.
    """
    found, seen = Survey(), set()
    packages: dict[str, list[tuple[int, int]]] = {}
    longest, total = (0, -1), 0
    for number, document in enumerate(documents):
        key = hashlib.sha256(document.text).digest()
        if key in seen:
            found.duplicates.add(number)
            continue
        seen.add(key)
        size = len(document.text)
        total += size
        longest = max(longest, (size, -number))
        packages.setdefault(document.package, []).append((number, size))
    goal, used = min(int(total * held_out), MOST_HELD_OUT_BYTES), 0
    for package in sorted(packages, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size = sum(size for _, size in packages[package])
        if used + size <= goal:
            used += size
            found.held_out.update(number for number, _ in packages[package])
    if used < goal / 2:
        found.cut = (-longest[1], longest[0] - (goal - used))
    return found


def _write(documents: Documents, tokenizer: Tokenizer, folder: Path, held_out: float) -> Manifest:
    plan = survey(documents, held_out)
    kept_back: list[Document] = []
    for number, document in enumerate(documents):
        if number in plan.held_out:
            kept_back.append(document)
        elif plan.cut is not None and number == plan.cut[0]:
            _, end = _cut(document, plan.cut[1])
            kept_back.append(end)
    containment = Containment([document.text for document in kept_back])
    train = Split(folder / "train", tokenizer)
    for number, document in enumerate(documents):
        if number in plan.duplicates or number in plan.held_out:
            continue
        if plan.cut is not None and number == plan.cut[0]:
            document, _ = _cut(document, plan.cut[1])
        containment.see(document.text)
        train.add(document)
    kept, contained, contained_bytes = Split(folder / "held_out", tokenizer), [], 0.0
    for document, share in zip(kept_back, containment.shares(), strict=True):
        if share > MOST_CONTAINED:
            contained.append({"name": document.name, "share": round(share, 4)})
        else:
            kept.add(document)
            contained_bytes += share * len(document.text)
    if contained and not kept.num_bytes:
        raise Refusal(_all_contained(documents, contained, held_out))
    contained_share = round(contained_bytes / max(1, kept.num_bytes), 4)
    return {
        "format": FORMAT,
        "source": documents.description,
        "licence": documents.licence,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "splits": {"train": train.close(), "held_out": kept.close() | {"contained_share": contained_share}},
        "duplicates": len(plan.duplicates),
        "contained": contained,
    }


def _all_contained(documents: Documents, contained: list[dict[str, Any]], held_out: float) -> str:
    first = contained[0]
    return (
        f"{documents.description}: all {len(contained)} documents that were to be held out were discarded, as training "
        f"has more than {MOST_CONTAINED:.0%} of each (of {first['name']!r} {first['share']:.0%}); give text that "
        f"repeats itself less, another share than held_out = {held_out:g}, or held_out = 0 to hold out nothing"
    )


class Split:
    """One of the two halves while it is written: its shard, and what the manifest says of it."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        self._writer, self._tokenizer = ShardWriter(prefix, tokenizer.vocab_size), tokenizer
        self.num_bytes = 0

    def add(self, document: Document) -> None:
        tokens = self._tokenizer.encode_bytes(document.text)
        self._writer.add(tokens, end=self._tokenizer.end_of_text)
        self.num_bytes += len(document.text)

    def close(self) -> dict[str, Any]:
        self._writer.close()
        return {
            "documents": len(self._writer.lengths),
            "tokens": sum(self._writer.lengths),
            "bytes": self.num_bytes,
            "files": {kind: asdict(digest) for kind, digest in self._writer.digests.items()},
        }


def _cut(document: Document, place: int) -> tuple[Document, Document]:
    """The document before and after the line end nearest below `place` (or that letter, where it is one line)."""
    at = document.text.rfind(b"\n", 0, place) + 1
    if not at:
        at = place
        while at and document.text[at] & 0xC0 == 0x80:  # inside a letter of several bytes
            at -= 1
    return (
        Document(document.name, document.package, document.text[:at]),
        Document(document.name + " (end)", document.package, document.text[at:]),
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time prepares a folder; the others wait and then find it there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_name(f".{folder.name}.lock").open("w")
    except OSError as error:
        raise Refusal(
            f"{folder.parent}: no prepared folder can be made there ({error.strerror}); give one that can be written"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
