"""The sources that a run draws rows from: what a config says of them, and how each is opened."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import Field

from data.corpus import Documents, local_python, text_documents
from data.order import derive, permute
from data.packing import Pack, Packing, pieces
from data.prepare import HELD_OUT_SHARE, prepare, recipe_of
from data.prepared import Prepared
from data.recall import RecallSettings
from data.rows import Rows, packed_rows
from data.tokenizer import Tokenizer
from settings import Refusal, Section


class LocalPythonSettings(Section):
    kind: Literal["local_python"] = "local_python"
    weight: float = Field(default=1.0, ge=0)


class TextSettings(Section):
    kind: Literal["text"] = "text"
    path: str
    """A .txt, .md, .jsonl(.gz) or .parquet file or a folder of them; prepared on first use."""
    weight: float = Field(default=1.0, ge=0)
    held_out: float = Field(default=HELD_OUT_SHARE, ge=0, lt=1)


class ShardsSettings(Section):
    kind: Literal["shards"] = "shards"
    path: str
    """A folder made by `python -m data prepare`."""
    weight: float = Field(default=1.0, ge=0)


SourceSettings = Annotated[
    LocalPythonSettings | TextSettings | ShardsSettings | RecallSettings, Field(discriminator="kind")
]
AnySource = LocalPythonSettings | TextSettings | ShardsSettings | RecallSettings


class Source(Protocol):
    """Numbered rows without end; row n of a length is a function of (key, n) and the source's content alone."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...

    def check(self, sequence_length: int) -> None:
        """Refuse a sequence length that the source cannot give."""
        ...

    def rows(self, numbers_R: np.ndarray, sequence_length: int, key: int) -> Rows: ...


@dataclass
class PackedSource:
    """Documents of a prepared folder, packed into rows and drawn in another random order each epoch."""

    name: str
    prepared: Prepared
    end_of_text: int
    pack: Pack
    _packings: dict[int, Packing] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return self.prepared.fingerprint

    def check(self, sequence_length: int) -> None:
        tokens = self.prepared.train.num_tokens
        if tokens < sequence_length:
            raise Refusal(
                f"data.sources.{self.name}: has {tokens} tokens for training, less than one sequence of "
                f"sequence_length={sequence_length}; use a longer text or a shorter sequence"
            )

    def packing(self, sequence_length: int) -> Packing:
        """The rows of one epoch at this length, made once."""
        if sequence_length not in self._packings:
            key = derive("packing", self.fingerprint, sequence_length)
            self._packings[sequence_length] = pieces(self.prepared.train.lengths, sequence_length, self.pack, key)
        return self._packings[sequence_length]

    def rows(self, numbers_R: np.ndarray, sequence_length: int, key: int) -> Rows:
        packing = self.packing(sequence_length)
        epoch_R, place_R = np.divmod(numbers_R, packing.num_rows)
        row_R = np.empty_like(place_R)
        for epoch in np.unique(epoch_R):
            of_epoch = epoch_R == epoch
            row_R[of_epoch] = permute(place_R[of_epoch], packing.num_rows, derive("epoch", key, int(epoch)))
        return packed_rows(packing, row_R, self.prepared.train, self.end_of_text)


def open_prepared(name: str, settings: AnySource, tokenizer: Tokenizer, folder: Path) -> Prepared:
    """Open a source's prepared folder; text and local code are prepared below `folder` when they are not there yet."""
    try:
        if isinstance(settings, ShardsSettings):
            return Prepared(Path(settings.path), tokenizer)
        held_out = settings.held_out if isinstance(settings, TextSettings) else HELD_OUT_SHARE
        documents: Documents = text_documents(settings.path) if isinstance(settings, TextSettings) else local_python()
        place = folder / f"{settings.kind}-{recipe_of(documents, tokenizer, held_out)[:12]}"
        prepare(documents, tokenizer, place, held_out)
        return Prepared(place, tokenizer)
    except Refusal as refusal:
        raise Refusal(f"data.sources.{name}: {refusal}") from None
