"""Tasks made of random tokens as a source of training rows: only what the task asks is a target."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, PositiveInt

from data.mixture import Weight
from data.order import counted, derive
from data.packing import ragged_ranges
from data.rows import NO_TARGET, Rows
from data.synthetic import Samples
from data.synthetic.copying import repeated_blocks
from data.synthetic.induction import induction_samples
from data.synthetic.mqar import POWER, mqar_samples
from data.tokenizer import Tokenizer
from settings import Refusal, Section


class InductionTask(Section):
    """What followed the only other mark of the sample (Mamba, table 11: 16 tokens, samples of 256)."""

    kind: Literal["induction"] = "induction"
    vocabulary: PositiveInt = 16

    def samples(self, keys_S: np.ndarray, length: int) -> Samples:
        return induction_samples(keys_S, length, self.vocabulary)


class MqarTask(Section):
    """The value of each key that comes again (Zoology trains on 64 tokens with 4 pairs, up to 256 with 64)."""

    kind: Literal["mqar"] = "mqar"
    pairs: PositiveInt
    vocabulary: PositiveInt = 8192
    power: float = Field(default=POWER, ge=-100, le=100)
    """Gaps of n pairs of tokens are drawn with weights n ** (power - 1)."""

    def samples(self, keys_S: np.ndarray, length: int) -> Samples:
        return mqar_samples(keys_S, length, self.pairs, self.vocabulary, self.power)


class CopyingTask(Section):
    """A block of random tokens, and the same again."""

    kind: Literal["copying"] = "copying"
    vocabulary: PositiveInt = 16

    def samples(self, keys_S: np.ndarray, length: int) -> Samples:
        if length % 2:
            raise Refusal(f"a block and its copy have an even number of tokens; length={length}, try {length + 1}")
        return repeated_blocks(keys_S, length // 2, self.vocabulary)


class SyntheticSettings(Section):
    kind: Literal["synthetic"] = "synthetic"
    task: Annotated[InductionTask | MqarTask | CopyingTask, Field(discriminator="kind")]
    weight: Weight = 1.0
    """Share of the rows, against the other sources' weights."""
    length: PositiveInt | None = None
    """Tokens of a sample; a row holds as many as fit without a rest. Left out, the sequence length."""


class SyntheticSource:
    """Rows full of samples of one length; row n is a function of (key, n) and the sequence length alone.

    Tokens are the ids 0 .. vocabulary - 1, whatever the tokenizer says with them.
    """

    def __init__(self, name: str, settings: SyntheticSettings, tokenizer: Tokenizer) -> None:
        vocabulary, end = settings.task.vocabulary, tokenizer.end_of_text
        if vocabulary > end:
            raise Refusal(
                f"data.sources.{name}.task.vocabulary={vocabulary} is more than the {end} ids below the tokenizer's "
                f'end of text; lower it, or set data.tokenizer = {{ kind = "integers", size = {vocabulary} }}'
            )
        self.name, self.settings = name, settings
        self.fingerprint = f"{derive(name, settings.model_dump_json(exclude={'weight'})):016x}"

    def check(self, sequence_length: int) -> None:
        """Refuse a sequence length that is no whole number of samples, and samples without room for the task."""
        length = self._length(sequence_length)
        if sequence_length % length:
            near = max(1, round(sequence_length / length)) * length
            raise Refusal(
                f"data.sources.{self.name}.length={length} must divide sequence_length={sequence_length}; try "
                f"sequence_length={near}"
            )
        try:
            self.settings.task.samples(np.empty(0, dtype=np.uint64), length)
        except Refusal as refusal:
            raise Refusal(f"data.sources.{self.name}: {refusal}") from None

    def mean_document_length(self, sequence_length: int) -> float:
        """Tokens of a sample."""
        return float(self._length(sequence_length))

    def rows(self, numbers_R: np.ndarray, sequence_length: int, key: int) -> Rows:
        """The rows with these numbers: every sample is a document of its own."""
        length, shape = self._length(sequence_length), (len(numbers_R), sequence_length)
        counts_R = np.full(len(numbers_R), sequence_length // length)
        row_keys_S = np.repeat(counted(key, numbers_R), counts_R)
        keys_S = counted(row_keys_S, ragged_ranges(np.zeros_like(counts_R), counts_R))
        samples = self.settings.task.samples(keys_S, length)
        labels_RT = samples.labels_ST.reshape(shape)
        return Rows(
            tokens_RT=samples.tokens_ST.reshape(shape),
            labels_RT=labels_RT,
            weights_RT=(labels_RT != NO_TARGET).astype(np.float32),
            document_lengths=np.full(len(keys_S), length),
            counts_R=counts_R,
            padding_R=np.zeros_like(counts_R),
        )

    def _length(self, sequence_length: int) -> int:
        return self.settings.length or sequence_length
