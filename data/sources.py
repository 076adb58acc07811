"""The sources that a run draws rows from: what a config says of them, and how each is opened."""

from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import Field

from data.corpus import Documents, local_python, text_documents
from data.mixture import Weight
from data.prepare import HELD_OUT_SHARE, prepare, recipe_of
from data.prepared import Prepared
from data.recall import RecallSettings
from data.rows import Rows
from data.synthetic.source import SyntheticSettings
from data.tokenizer import Tokenizer
from settings import Refusal, Section


class LocalPythonSettings(Section):
    kind: Literal["local_python"] = "local_python"
    weight: Weight = 1.0


class TextSettings(Section):
    kind: Literal["text"] = "text"
    path: str
    """A .txt, .md, .jsonl(.gz) or .parquet file or a folder of them; prepared on first use."""
    weight: Weight = 1.0
    held_out: float = Field(default=HELD_OUT_SHARE, ge=0, lt=1)


class ShardsSettings(Section):
    kind: Literal["shards"] = "shards"
    path: str
    """A folder made by `python -m data prepare`."""
    weight: Weight = 1.0


DocumentSettings = LocalPythonSettings | TextSettings | ShardsSettings
"""Sources of text; the others make their samples."""
SourceSettings = Annotated[DocumentSettings | RecallSettings | SyntheticSettings, Field(discriminator="kind")]


class Source(Protocol):
    """Numbered rows without end; row n of a length is a function of (key, n) and the source's content alone."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...

    def check(self, sequence_length: int) -> None:
        """Refuse a sequence length that the source cannot give."""
        ...

    def mean_document_length(self, sequence_length: int) -> float:
        """Tokens of a document on average, or of a sample in rows of this length."""
        ...

    def rows(self, numbers_R: np.ndarray, sequence_length: int, key: int) -> Rows: ...


def open_prepared(name: str, settings: DocumentSettings, tokenizer: Tokenizer, folder: Path) -> Prepared:
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
