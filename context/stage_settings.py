"""What a configuration says of its stages. Every key that may be left out then means what the run does anyway."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from context.gate import GateSettings
from context.growth import Growth
from context.rates import Continue, StageRate
from context.rotary import AnyRotary
from context.shares import MixtureUnit
from data.buckets import Buckets
from data.mixture import Weight
from data.packing import Pack
from data.positions import LONGEST, AnyPositions, Consecutive
from settings import Section


class StageSettings(Section):
    """One stretch of training: which rows, how they are rotated, how the optimizer goes on, and what has to come out.

    The next stage's rows may be longer or shorter.
    """

    until_tokens: int = Field(ge=1)
    """Tokens of the whole run at which it ends; it ends with the step that reaches them."""
    sequence_length: int = Field(ge=1, le=LONGEST)
    """Tokens of a row; with a growth of lengths, of the rows that it leads to."""
    rotary: AnyRotary
    """It takes over at the stage's first step, and nothing else ever changes it."""
    tokens_per_step: int | None = Field(default=None, ge=1, le=2**40)
    """Tokens in one optimizer step of this stage, whatever its length; left out, the run's."""
    growth: Growth | None = None
    """How the length, or what attention sees, changes inside the stage; left out, it does not."""
    learning_rate: StageRate = Continue()
    moments: Literal["keep", "reset"] = "keep"
    """What the optimizer remembers of earlier gradients: kept, or forgotten before the stage's first step."""
    mixture: dict[str, Weight] = Field(default_factory=dict)
    """Source to share, in `mixture_unit`; shares need not sum to one. Left out: the sources' own weights."""
    mixture_unit: MixtureUnit = "tokens"
    """What the shares count: published ones mean either. Of tokens, or of documents, which are as long as they are."""
    buckets: Buckets = Field(default_factory=dict)
    """Source to shares of its tokens by the length of documents; left out: as the source has them."""
    pack: Pack | None = None
    """How documents are packed into rows; left out, as data.pack says."""
    has_document_mask: bool = True
    """Whether attention, positions and targets stay inside a document."""
    positions: AnyPositions = Consecutive()
    """Which positions the tokens of a row are told to have: their places, or with skips (PoSE)."""
    context: PositiveInt | None = None
    """Ranks that hold a row together in this stage; left out, parallel.context."""
    gate: GateSettings | None = None
    """What the model has to show at the stage's end; left out, nothing."""

    @model_validator(mode="after")
    def _shares_make_sense(self) -> Self:
        if self.mixture and not any(self.mixture.values()):
            raise ValueError("mixture gives every source the share 0; give one of them more, or leave the table out")
        if not self.mixture and self.mixture_unit != "tokens":
            raise ValueError(
                f"mixture_unit={self.mixture_unit!r} is the unit of a mixture, but there is none: the sources' own "
                "weights are shares of tokens. Add a mixture or leave mixture_unit out"
            )
        return self


class ContextSettings(Section):
    """How the context grows: one stage after the other."""

    stages: tuple[StageSettings, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for number, (before, after) in enumerate(zip(self.stages, self.stages[1:], strict=False), start=1):
            if after.until_tokens <= before.until_tokens:
                raise ValueError(
                    f"stages.{number}.until_tokens={after.until_tokens} must be above stages.{number - 1}.until_tokens="
                    f"{before.until_tokens}: it counts the tokens of the whole run"
                )
        return self
