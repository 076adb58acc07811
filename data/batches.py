"""The batches of a run: any sample of any stage at once, the same at every world size."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from data.mixture import Blend
from data.order import counted, derive
from data.packing import Pack
from data.recall import Haystack, RecallSettings, RecallSource
from data.rows import NO_TARGET, Rows, interleave
from data.sources import PackedSource, Source, SourceSettings, open_prepared
from data.tokenizer import ByteSettings, Tokenizer, TokenizerSettings, build_tokenizer
from settings import Refusal, Section, nearest


class DataSettings(Section):
    tokenizer: TokenizerSettings = ByteSettings()
    sources: dict[str, SourceSettings] = Field(min_length=1)
    """What rows are drawn from, by name; weights are shares of tokens and need not sum to one."""
    pack: Pack = "best_fit"
    prepared: str = "prepared"
    """Folder for shards that are made on this machine from text."""

    @model_validator(mode="after")
    def _haystacks_exist(self) -> "DataSettings":
        texts = [name for name, source in self.sources.items() if not isinstance(source, RecallSettings)]
        for name, source in self.sources.items():
            if isinstance(source, RecallSettings) and source.haystack not in texts:
                known = nearest(source.haystack, texts)
                raise ValueError(f"sources.{name}.haystack={source.haystack!r} must name a source of text{known}")
        if all(source.weight == 0 for source in self.sources.values()):
            raise ValueError("sources: every weight is 0; give at least one a positive weight")
        return self


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B packed rows of T tokens.

    tokens_BT int64; labels_BT int64, -100 where nothing is to be predicted; weights_BT float32, the loss weight of each
    label; positions_BT int64, the position inside the document piece; places_BT int64, the place in the row; sources_B
    int64, places in `Batches.names`. lengths: document pieces in row-major order; they sum to B*T and none crosses a
    row. is_real_BT: False where padding stands. rows_B: each row's number in the step; keys_B: a number that no other
    row of the run has; both int64.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    weights_BT: Tensor
    positions_BT: Tensor
    places_BT: Tensor
    lengths: tuple[int, ...]
    sources_B: Tensor
    is_real_BT: Tensor
    rows_B: Tensor
    keys_B: Tensor
    num_targets: int
    num_tokens: int
    num_real: int
    """Tokens that are no padding."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        return self.tokens_BT.shape[1]

    @property
    def num_documents(self) -> int:
        """Document pieces that begin here; padding at a row's end is one too."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; to CUDA from pinned memory, without waiting."""
        device = torch.device(device)

        def moved(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and tensor.device.type == "cpu":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        tensors: Any = {name: moved(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


class Batches:
    """Opens the sources of a run and gives any range of its samples.

    Raises Refusal where a source is missing, empty, changed since it was prepared, or made with another tokenizer.
    """

    def __init__(self, settings: DataSettings, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.settings = settings
        self.tokenizer: Tokenizer = build_tokenizer(settings.tokenizer)
        self.names: tuple[str, ...] = tuple(settings.sources)
        self.world_size = world_size
        self._seed, self._rank = seed, rank
        self._sources: dict[str, Source] = self._open()
        self._blends: dict[tuple[float, ...], Blend] = {}

    def _open(self) -> dict[str, Source]:
        packed: dict[str, PackedSource] = {}
        for name, source in self.settings.sources.items():
            if not isinstance(source, RecallSettings):
                prepared = open_prepared(name, source, self.tokenizer, Path(self.settings.prepared))
                packed[name] = PackedSource(name, prepared, self.tokenizer.end_of_text, self.settings.pack)
        opened: dict[str, Source] = {}
        for name, source in self.settings.sources.items():
            if isinstance(source, RecallSettings):
                text = packed[source.haystack]
                haystack = Haystack(text.prepared.train.tokens, text.prepared.train.lengths)
                opened[name] = RecallSource(name, source, self.tokenizer, haystack, text.fingerprint)
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

    def check(self, sequence_length: int, mixture: Mapping[str, float] | None = None) -> None:
        """Refuse a length or a mixture that the sources cannot give; call it for every stage before the first step."""
        for name, weight in zip(self.names, self._weights(mixture or {}), strict=True):
            if weight > 0:
                self._sources[name].check(sequence_length)

    def take(  # noqa: PLR0917 (one call names a range of samples; there is nothing to group)
        self,
        stage_index: int,
        sequence_length: int,
        mixture: Mapping[str, float],
        first_sample: int,
        num_samples: int,
        rows_per_microbatch: int,
    ) -> list[Batch]:
        """This rank's micro-batches of the stage's samples first_sample .. first_sample + num_samples - 1.

        A pure function of its arguments, the seed and the fingerprint. Micro-batch i of all ranks' goes to rank
        i % world_size. `mixture` replaces the sources' own weights; empty, those count.
        """
        self.check(sequence_length, mixture)
        together = self.world_size * rows_per_microbatch
        if num_samples % together:
            raise Refusal(
                f"{num_samples} samples of {sequence_length} tokens must divide into world_size={self.world_size} x "
                f"{rows_per_microbatch} rows a micro-batch; change tokens_per_step, tokens_per_microbatch or the ranks"
            )
        blend = self._blend(mixture)
        source_S, number_S = blend.take(first_sample, num_samples)
        mine = np.arange(num_samples) // rows_per_microbatch % self.world_size == self._rank
        source_R, number_R = source_S[mine], number_S[mine]
        parts = []
        for which in np.unique(source_R):
            source = self._sources[self.names[which]]
            places = np.flatnonzero(source_R == which)
            key = derive(self._seed, stage_index, source.fingerprint)
            parts.append((places, source.rows(number_R[places], sequence_length, key)))
        rows = interleave(parts, len(source_R), sequence_length) if parts else None
        if rows is None:
            return []
        row_R = np.flatnonzero(mine)
        keys_R = counted(derive(self._seed, "rows", stage_index), first_sample + row_R).view(np.int64)
        return _split(rows, source_R, row_R, keys_R, rows_per_microbatch)

    def _blend(self, mixture: Mapping[str, float]) -> Blend:
        weights = self._weights(mixture)
        if weights not in self._blends:
            self._blends[weights] = Blend(weights)
        return self._blends[weights]

    def _weights(self, mixture: Mapping[str, float]) -> tuple[float, ...]:
        unknown = [name for name in mixture if name not in self._sources]
        if unknown:
            raise Refusal(
                f"mixture names {unknown[0]!r}, which is not in data.sources{nearest(unknown[0], self.names)}"
            )
        if mixture and (min(mixture.values()) < 0 or sum(mixture.values()) <= 0):
            raise Refusal(f"mixture={dict(mixture)} must have no negative weight and at least one positive")
        own = {name: source.weight for name, source in self.settings.sources.items()}
        return tuple(float(mixture.get(name, 0.0) if mixture else own[name]) for name in self.names)


def _split(
    rows: Rows, source_R: np.ndarray, row_R: np.ndarray, keys_R: np.ndarray, rows_per_microbatch: int
) -> list[Batch]:
    """Cut rows into micro-batches; positions start anew at each document."""
    num_rows, sequence_length = rows.tokens_RT.shape
    stops = np.cumsum(rows.document_lengths)
    positions = np.arange(num_rows * sequence_length) - np.repeat(stops - rows.document_lengths, rows.document_lengths)
    positions_RT = positions.reshape(num_rows, sequence_length)
    is_real_RT = np.arange(sequence_length) < (sequence_length - rows.padding_R)[:, None]
    document_ends_R = np.cumsum(rows.counts_R)
    batches = []
    for first in range(0, num_rows, rows_per_microbatch):
        window = slice(first, first + rows_per_microbatch)
        documents = slice(document_ends_R[first] - rows.counts_R[first], document_ends_R[window][-1])
        labels_BT = rows.labels_RT[window]
        batches.append(
            Batch(
                tokens_BT=torch.from_numpy(rows.tokens_RT[window]),
                labels_BT=torch.from_numpy(labels_BT),
                weights_BT=torch.from_numpy(rows.weights_RT[window]),
                positions_BT=torch.from_numpy(positions_RT[window]),
                places_BT=torch.arange(sequence_length).repeat(len(labels_BT), 1),
                lengths=tuple(rows.document_lengths[documents].tolist()),
                sources_B=torch.from_numpy(source_R[window]),
                is_real_BT=torch.from_numpy(is_real_RT[window]),
                rows_B=torch.from_numpy(row_R[window]),
                keys_B=torch.from_numpy(keys_R[window]),
                num_targets=int((labels_BT != NO_TARGET).sum()),
                num_tokens=labels_BT.size,
                num_real=int(is_real_RT[window].sum()),
            )
        )
    return batches
