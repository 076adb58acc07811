"""A folder of shards, train and held out, under a manifest that says what they are made of: opening and checking it."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from data.shards import FileDigest, Shard, anew, check_file, files_of
from data.tokenizer import Tokenizer
from settings import Refusal, Section

FORMAT = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "held_out")
# Token files above this size are not read whole each time they are opened; `python -m data verify` does.
READ_WHOLE_BELOW = 256 << 20

Manifest = dict[str, Any]


class FileFacts(Section):
    size: int
    sha256: str


class TokenizerFacts(Section):
    fingerprint: str
    vocab_size: int


class SplitFacts(Section):
    documents: int
    tokens: int
    bytes: int
    files: dict[Literal["bin", "idx"], FileFacts]


class HeldOutFacts(SplitFacts):
    contained_share: float
    """The share of this text's runs of thirteen words that training has too: what was kept, weighted by bytes."""


class Splits(Section):
    train: SplitFacts
    held_out: HeldOutFacts


class Contained(Section):
    name: str
    share: float


class ManifestFacts(Section):
    """What `manifest.json` holds."""

    format: int
    source: str
    licence: str
    tokenizer: TokenizerFacts
    splits: Splits
    duplicates: int
    contained: tuple[Contained, ...]
    """Documents that were to be held out and stand in neither half, as training has too much of them."""
    recipe: str


class Prepared:
    """A prepared folder, opened and checked against its manifest: `train` and `held_out` shards."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, read_whole: bool = False) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        made_with = self.manifest["tokenizer"]
        if made_with["fingerprint"] != tokenizer.fingerprint:
            raise Refusal(
                f"{folder}: was prepared with another tokenizer (fingerprint {made_with['fingerprint'][:12]}..., "
                f"data.tokenizer has {tokenizer.fingerprint[:12]}...); use that tokenizer, or {anew(folder)}"
            )
        digests = _check_files(folder, self.manifest, read_whole)
        self.fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()
        self.train, self.held_out = _open_shards(folder, self.manifest, read_whole)


def verify(folder: Path) -> Manifest:
    """Read every file of a prepared folder whole and compare its digest; Refusal naming the file that differs."""
    manifest = read_manifest(folder)
    _check_files(folder, manifest, read_whole=True)
    _open_shards(folder, manifest, read_whole=True)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"{folder}: is a file, not a prepared folder; give another folder")
    if not path.is_file():
        made = f"`python -m data prepare SOURCE {folder}`"
        if is_empty(folder):
            raise Refusal(f"{folder}: holds no {MANIFEST}; make it with {made}")
        raise Refusal(
            f"{folder}: holds files but no {MANIFEST}, so it is no prepared folder; "
            f"give another folder, or remove this one and make it with {made}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
            raise Refusal(f"{path}: format {manifest['format']} is not {FORMAT}; {anew(folder)}")
        ManifestFacts.model_validate_json(json.dumps(manifest))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise Refusal(f"{path}: is damaged ({place or 'the whole'}: {problem['msg']}); {anew(folder)}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Refusal(f"{path}: is damaged ({error}); {anew(folder)}") from None
    return manifest


def is_empty(folder: Path) -> bool:
    """Whether nothing is there: no such folder, or one without files."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _open_shards(folder: Path, manifest: Manifest, read_whole: bool) -> list[Shard]:
    """The shards of both splits; refused where they are not what the manifest says of them."""
    shards, vocab_size = [], manifest["tokenizer"]["vocab_size"]
    for split in SPLITS:
        shard, facts = Shard(folder / split), manifest["splits"][split]
        found, said = (shard.num_documents, shard.num_tokens), (facts["documents"], facts["tokens"])
        if found != said:
            raise Refusal(
                f"{folder / split}: holds {found[0]} documents of {found[1]} tokens, its manifest says {said[0]} of "
                f"{said[1]}; {anew(folder)}"
            )
        if read_whole or shard.tokens.nbytes < READ_WHOLE_BELOW:
            shard.check_ids(vocab_size)
        shards.append(shard)
    return shards


def _check_files(folder: Path, manifest: Manifest, read_whole: bool) -> list[str]:
    digests = []
    for split in SPLITS:
        for kind, path in files_of(folder / split).items():
            expected = FileDigest(**manifest["splits"][split]["files"][kind])
            check_file(path, expected, read_whole or kind == "idx" or expected.size < READ_WHOLE_BELOW)
            digests.append(expected.sha256)
    return digests
