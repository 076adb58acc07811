"""A stage's gate: what the model has to show at the stage's end before the run goes on.

Llama 3 (arXiv 2407.21783, section 3.4.2) lengthened its context in stages and went on only once two things held: the
evaluations on short text were back at their level, and a needle was found at every place of the new length.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from settings import Section


class GateSettings(Section):
    """Asked at the stage's end, of the evaluations that the run makes there anyway."""

    needle: float | None = Field(default=None, ge=0, le=1)
    """The least mean of `needle` at the stage's sequence length, over all depths; left out, not asked."""
    max_short_loss_increase: float | None = Field(default=None, ge=0)
    """Bits per byte, absolute, by which held-out text may have become worse over the stage, read at the sequence length
    of the stage before; each source on its own, so that a good one does not hide a bad one. Left out, not asked."""
    action: Literal["continue", "warn", "stop"] = "warn"
    """What a gate that is not met does. Its verdict is written down whatever this says.

    continue: nothing. warn: a warning in the terminal. stop: the stage is saved, and the run ends with exit status 2.
    """

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if self.needle is None and self.max_short_loss_increase is None:
            raise ValueError("asks nothing: set needle, max_short_loss_increase or both, or leave the gate out")
        return self
