"""The batches of a run: any sample of any stage at once, the same at every world size."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from data.batch import Batch, cut
from data.demand import Demand
from data.mix import Mix, mix_of
from data.order import counted, derive
from data.packed import PackedSource
from data.packing import Pack
from data.positions import check_reach
from data.recall import Haystack, RecallSettings, RecallSource
from data.rows import interleave
from data.sources import DocumentSettings, Source, SourceSettings, open_prepared
from data.synthetic.source import SyntheticSettings, SyntheticSource
from data.tokenizer import ByteSettings, Tokenizer, TokenizerSettings, build_tokenizer
from settings import Refusal, Section, nearest

__all__ = ["Batch", "Batches", "DataSettings"]


NAME = re.compile(r"[\w][\w .+-]{0,79}")
"""Of a source: it stands in keys, tables and the titles of pictures, where `$` would begin a formula."""


class DataSettings(Section):
    tokenizer: TokenizerSettings = ByteSettings()
    sources: dict[str, SourceSettings] = Field(min_length=1)
    """What rows are drawn from, by name; weights are shares of tokens and need not sum to one."""
    pack: Pack = "best_fit"
    prepared: str = "prepared"
    """Folder for shards that are made on this machine from text."""

    @model_validator(mode="after")
    def _names_are_plain(self) -> "DataSettings":
        for name in self.sources:
            if not NAME.fullmatch(name):
                raise ValueError(f"sources: {name!r} is no name; take letters, digits, spaces and ._+-, 80 at most")
        return self

    @model_validator(mode="after")
    def _haystacks_exist(self) -> "DataSettings":
        texts = [name for name, source in self.sources.items() if isinstance(source, DocumentSettings)]
        for name, source in self.sources.items():
            if isinstance(source, RecallSettings) and source.haystack not in texts:
                known = nearest(source.haystack, texts)
                raise ValueError(f"sources.{name}.haystack={source.haystack!r} must name a source of text{known}")
        if all(source.weight == 0 for source in self.sources.values()):
            raise ValueError("sources: every weight is 0; give at least one a positive weight")
        return self


class Batches:
    """Opens the sources of a run and gives any range of its samples.

    Raises Refusal where a source is missing, empty, changed since it was prepared, or made with another tokenizer.
    """

    def __init__(self, settings: DataSettings, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.settings = settings
        try:
            self.tokenizer: Tokenizer = build_tokenizer(settings.tokenizer)
        except Refusal as refusal:
            raise Refusal(f"data.tokenizer: {refusal}") from None
        self.names: tuple[str, ...] = tuple(settings.sources)
        self.world_size = world_size
        self.rank = rank
        self._seed = seed
        self._sources: dict[str, Source] = self._open()
        self._mixes: dict[tuple[Any, ...], Mix] = {}

    def _open(self) -> dict[str, Source]:
        packed: dict[str, PackedSource] = {}
        for name, source in self.settings.sources.items():
            if isinstance(source, DocumentSettings):
                prepared = open_prepared(name, source, self.tokenizer, Path(self.settings.prepared))
                packed[name] = PackedSource(name, prepared, self.tokenizer.end_of_text, self.settings.pack)
        opened: dict[str, Source] = {}
        for name, source in self.settings.sources.items():
            if isinstance(source, RecallSettings):
                text = packed[source.haystack]
                haystack = Haystack(text.prepared.train.tokens, text.prepared.train.lengths)
                opened[name] = RecallSource(name, source, self.tokenizer, haystack, text.fingerprint)
            elif isinstance(source, SyntheticSettings):
                opened[name] = SyntheticSource(name, source, self.tokenizer)
            else:
                opened[name] = packed[name]
        return opened

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the samples rest on besides the seed: the tokenizer, the packing, the content of each source."""
        sources = {f"sources.{name}": source.fingerprint for name, source in self._sources.items()}
        return {"tokenizer": self.tokenizer.fingerprint, "pack": self.settings.pack, **sources}

    def held_out(self, name: str) -> np.ndarray:
        """The held-out tokens (N,) of a source of text, each document followed by `end_of_text`; memory-mapped."""
        source = self._sources.get(name)
        if not isinstance(source, PackedSource):
            texts = [known for known, other in self._sources.items() if isinstance(other, PackedSource)]
            raise Refusal(f"{name!r} is not a source with held-out text{nearest(name, texts)}")
        if not source.prepared.held_out.num_tokens:
            raise Refusal(
                f"data.sources.{name}: nothing of it is held out; prepare it with held_out = 0.03 "
                "(`python -m data prepare` takes --held-out 0.03), or name another source"
            )
        return source.prepared.held_out.tokens

    def all_held_out(self) -> dict[str, np.ndarray]:
        """`held_out` of every source that has some."""
        packed = {name: source for name, source in self._sources.items() if isinstance(source, PackedSource)}
        return {name: self.held_out(name) for name, source in packed.items() if source.prepared.held_out.num_tokens}

    def mean_document_lengths(self, demand: Demand) -> dict[str, float]:
        """Tokens of each source's documents on average, drawn by its buckets, or of its samples in rows of this length.

        The mixture does not matter. 0 where a source has no documents.
        """
        everything = replace(demand, mixture=dict.fromkeys(self.names, 1.0))
        return {self.names[which]: mean for which, mean in self._mix(everything).mean_document_lengths(demand).items()}

    def check(self, demand: Demand) -> None:
        """Refuse what the sources cannot give; call it for every demand of a run before the first step."""
        try:
            check_reach(demand.positions, demand.sequence_length)
            self._mix(demand).check(demand.sequence_length)
        except Refusal as refusal:
            raise Refusal(f"{demand.where}{refusal}") from None

    def take(  # noqa: PLR0917 (one call names a range of samples; there is nothing to group)
        self,
        demand: Demand,
        first_sample: int,
        num_samples: int,
        rows_per_microbatch: int,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> list[Batch]:
        """One rank's micro-batches of the demand's samples first_sample .. first_sample + num_samples - 1.

        A pure function of its arguments, the seed and the fingerprint. Micro-batch i of all ranks' goes to rank
        i % world_size; left out, rank and world_size are those given at construction.
        """
        rank = self.rank if rank is None else rank
        world_size = self.world_size if world_size is None else world_size
        together = world_size * rows_per_microbatch
        if num_samples % together:
            raise Refusal(
                f"{num_samples} samples of {demand.sequence_length} tokens must divide into world_size={world_size} x "
                f"{rows_per_microbatch} rows a micro-batch; change tokens_per_step, tokens_per_microbatch or the ranks"
            )
        self.check(demand)
        mix = self._mix(demand)
        part_S, number_S = mix.blend.take(first_sample, num_samples)
        mine = np.arange(num_samples) // rows_per_microbatch % world_size == rank
        part_R, number_R, row_R = part_S[mine], number_S[mine], np.flatnonzero(mine)
        taken = []
        for part in np.unique(part_R):
            places, chosen = np.flatnonzero(part_R == part), mix.parts[part]
            key = derive(self._seed, *demand.key_parts, chosen.source.fingerprint)
            taken.append((places, chosen.rows(number_R[places], demand, key)))
        if not taken:
            return []
        rows = interleave(taken, len(part_R), demand.sequence_length)
        if rows.tokens_RT.max() >= self.tokenizer.vocab_size:  # shards that are too large to be read whole
            raise Refusal(
                f"{demand.where}data.sources: has id {rows.tokens_RT.max()}, the tokenizer {self.tokenizer.vocab_size} "
                "ids; `python -m data verify` names the folder"
            )
        keys_R = counted(derive(self._seed, "rows", *demand.key_parts), first_sample + row_R).view(np.int64)
        source_R = np.array([part.which for part in mix.parts])[part_R]
        return cut(rows, demand, source_R, row_R, keys_R, rows_per_microbatch)

    def _mix(self, demand: Demand) -> Mix:
        """The parts that a demand draws from, kept: their rows are packed once."""
        weights = self._weights(demand.mixture)
        buckets = tuple(sorted(demand.buckets.items()))
        key = (*weights.values(), buckets, demand.pack, demand.is_longest)
        if key not in self._mixes:
            self._mixes[key] = mix_of(demand, self._sources, weights, self.settings.pack)
        return self._mixes[key]

    def _weights(self, mixture: Mapping[str, float]) -> dict[str, float]:
        unknown = [name for name in mixture if name not in self._sources]
        if unknown:
            raise Refusal(
                f"mixture names {unknown[0]!r}, which is not in data.sources{nearest(unknown[0], self.names)}"
            )
        if mixture and (min(mixture.values()) < 0 or sum(mixture.values()) <= 0):
            raise Refusal(f"mixture={dict(mixture)} must have no negative weight and at least one positive")
        own = {name: source.weight for name, source in self.settings.sources.items()}
        return {name: float(mixture.get(name, 0.0) if mixture else own[name]) for name in self.names}
