"""The parts that a demand's rows come from, and their shares: each source, or each of its bands of lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data.buckets import bands_of
from data.demand import Demand
from data.mixture import Blend
from data.packed import PackedSource
from data.packing import Pack
from data.rows import Rows, joined
from data.sources import Source
from settings import Refusal, nearest


@dataclass(frozen=True)
class Part:
    """What gives whole rows: a source, or its documents of one band."""

    which: int
    """Place of the source among all."""
    source: Source
    weight: float
    """Share of the rows, against the other parts' weights."""

    def rows(self, numbers_R: np.ndarray, demand: Demand, key: int) -> Rows:
        """Its rows with these numbers. Where documents are not masked, text is predicted across their borders too.

        A source that makes its samples has said what is to be predicted: what follows a sample is noise.
        """
        rows = self.source.rows(numbers_R, demand.sequence_length, key)
        is_text = isinstance(self.source, PackedSource)
        return joined(rows) if is_text and not demand.has_document_mask else rows


@dataclass(frozen=True)
class Mix:
    """All parts of a demand, blended: every prefix of the stage is as near to their shares as whole rows can be."""

    parts: Sequence[Part]
    blend: Blend = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blend", Blend([part.weight for part in self.parts]))

    def check(self, sequence_length: int) -> None:
        """Refuse a length that a part which is drawn from cannot give."""
        for part in self.parts:
            if part.weight > 0:
                part.source.check(sequence_length)

    def mean_document_lengths(self, demand: Demand) -> dict[int, float]:
        """Tokens of each source's documents on average, as often as each part gives them; 0: it has none."""
        documents: dict[int, float] = {}
        tokens: dict[int, float] = {}
        for part in self.parts:
            mean = part.source.mean_document_length(demand.sequence_length)
            tokens[part.which] = tokens.get(part.which, 0.0) + (part.weight if mean else 0.0)
            documents[part.which] = documents.get(part.which, 0.0) + (part.weight / mean if mean else 0.0)
        return {which: tokens[which] / documents[which] if documents[which] else 0.0 for which in documents}


def mix_of(demand: Demand, sources: Mapping[str, Source], weights: Mapping[str, float], pack: Pack) -> Mix:
    """The mix of a demand over opened sources; `weights` are shares of rows, `pack` is that of the run.

    Raises Refusal where buckets name what is no source of documents, or make no sense.
    """
    for name in demand.buckets:
        if name not in sources:
            raise Refusal(f"buckets names {name!r}, which is not in data.sources{nearest(name, list(sources))}")
        if not isinstance(sources[name], PackedSource):
            raise Refusal(
                f"buckets.{name}: this source makes its samples and has no documents; leave it out of buckets"
            )
    parts = []
    for which, (name, source) in enumerate(sources.items()):
        for part, share in _parts_of(name, source, demand, pack):
            parts.append(Part(which, part, weights[name] * share))
    return Mix(tuple(parts))


def _parts_of(name: str, source: Source, demand: Demand, pack: Pack) -> list[tuple[Source, float]]:
    if not isinstance(source, PackedSource):
        return [(source, 1.0)]
    pack = demand.pack or pack
    if name not in demand.buckets:
        return [(source.part(None, pack, is_longest=demand.is_longest), 1.0)]
    try:
        bands = bands_of(demand.buckets[name])
    except ValueError as error:
        raise Refusal(f"buckets.{name}: {error}") from None
    return [(source.part(band, pack, is_longest=demand.is_longest), band.share) for band in bands]
