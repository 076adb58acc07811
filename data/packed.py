"""Documents as a source of rows: packed to a length, in another random order each epoch."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from data.buckets import Band
from data.order import derive, permute
from data.packing import Pack, Packing, pieces
from data.prepared import Prepared
from data.rows import Rows, packed_rows
from settings import Refusal


@dataclass
class PackedSource:
    """Documents of a prepared folder, all or those of one band of lengths, packed into rows."""

    name: str
    prepared: Prepared
    end_of_text: int
    pack: Pack
    band: Band | None = None
    is_longest: bool = True
    """Whether no rows of the stage are longer than those asked for; what is left over by them is cut into shorter."""
    _packings: dict[int, Packing] = field(default_factory=dict, repr=False)

    @property
    def fingerprint(self) -> str:
        return self.prepared.fingerprint

    @cached_property
    def documents(self) -> np.ndarray:
        """Numbers of the documents for training that lie in the band, int64 (D,)."""
        lengths = self.prepared.train.lengths
        return np.arange(len(lengths)) if self.band is None else np.flatnonzero(self.band.holds(lengths))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each of them, int64 (D,)."""
        return self.prepared.train.lengths[self.documents].astype(np.int64)

    def part(self, band: Band | None, pack: Pack, *, is_longest: bool) -> "PackedSource":
        """The same source, of one band and packed so; itself where nothing differs."""
        is_longest = is_longest or pack != "decompose"
        if (band, pack, is_longest) == (self.band, self.pack, self.is_longest):
            return self
        return replace(self, band=band, pack=pack, is_longest=is_longest, _packings={})

    def check(self, sequence_length: int) -> None:
        """Refuse a length that these documents do not fill one row of."""
        where, lengths = f"data.sources.{self.name}", self.lengths
        if self.band is not None and not len(lengths):
            longest = int(self.prepared.train.lengths.max(initial=0))
            raise Refusal(
                f"{where}: has no document of {self.band} for its bucket, the longest has {longest:,}; change "
                "from_tokens, or leave these a share of 0"
            )
        tokens = int(lengths.sum())
        if tokens < sequence_length:
            which = "" if self.band is None else f" in its {len(lengths)} documents of {self.band}"
            raise Refusal(
                f"{where}: has {tokens} tokens for training{which}, less than one sequence of "
                f"sequence_length={sequence_length}; use a longer text or a shorter sequence"
            )
        if self.pack == "decompose" and sequence_length & (sequence_length - 1):
            raise Refusal(
                f'pack = "decompose" cuts documents into powers of two; sequence_length={sequence_length} is none, try '
                f"{1 << sequence_length.bit_length() - 1} or {1 << sequence_length.bit_length()}"
            )
        if self.pack == "decompose" and not self.packing(sequence_length).num_rows:
            raise Refusal(
                f"{where}: no document, cut into powers of two, gives a piece of sequence_length={sequence_length} "
                'tokens; use another length or pack = "best_fit"'
            )

    def mean_document_length(self, _sequence_length: int) -> float:
        """Tokens of a document on average, the one that ends it included; rows do not change it."""
        return float(self.lengths.mean()) if len(self.lengths) else 0.0

    def packing(self, sequence_length: int) -> Packing:
        """The rows of one epoch at this length, made once."""
        if sequence_length not in self._packings:
            key = derive("packing", self.fingerprint, sequence_length)
            packing = pieces(self.lengths, sequence_length, self.pack, key, is_longest=self.is_longest)
            self._packings[sequence_length] = replace(packing, documents=self.documents[packing.documents])
        return self._packings[sequence_length]

    def rows(self, numbers_R: np.ndarray, sequence_length: int, key: int) -> Rows:
        """The rows with these numbers; every epoch of `num_rows` has each row once."""
        packing = self.packing(sequence_length)
        epoch_R, place_R = np.divmod(numbers_R, packing.num_rows)
        row_R = np.empty_like(place_R)
        for epoch in np.unique(epoch_R):
            of_epoch = epoch_R == epoch
            row_R[of_epoch] = permute(place_R[of_epoch], packing.num_rows, derive("epoch", key, int(epoch)))
        return packed_rows(packing, row_R, self.prepared.train, self.end_of_text)
