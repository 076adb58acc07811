"""One step of a run, as a pure function of the tokens seen: where it stands, and which samples it takes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from context.stages import Stage


@dataclass(frozen=True)
class StepPlan:
    """All that a step of the run is told beforehand; the same however the run was broken off before it."""

    stage: "Stage"
    start_tokens: int
    """Tokens of the whole run before it."""
    num_tokens: int
    sequence_length: int
    """Of its rows; where the stage has a growth it changes from step to step."""
    first_sample: int
    """Counted among the samples of this stage and this length, so that none of them is used twice."""
    window: int | None = None
    """How many tokens back every layer sees in training, itself included; None: what the layer says."""

    @property
    def num_samples(self) -> int:
        """Rows over all ranks and micro-batches."""
        return self.num_tokens // self.sequence_length

    @property
    def end_tokens(self) -> int:
        """Tokens of the whole run after it."""
        return self.start_tokens + self.num_tokens

    @property
    def length_key(self) -> str:
        """Where in the configuration its length comes from."""
        is_own = self.sequence_length == self.stage.sequence_length
        return f"{self.stage.key}.sequence_length" if is_own else f"{self.stage.key}.growth: length"

    @property
    def is_first_of_stage(self) -> bool:
        return self.start_tokens == self.stage.start_tokens

    @property
    def is_last_of_stage(self) -> bool:
        return self.end_tokens == self.stage.until_tokens
