"""A device as a small TOML file: what it can do at best, what was measured of it, and how it is joined to others."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from planning.speeds import KERNELS
from settings import Section

FOLDER = Path(__file__).parents[1] / "configs" / "devices"
Share = Annotated[float, Field(gt=0, le=1)]


class LinkSettings(Section):
    """One way from a rank to another."""

    name: str
    """What a plan calls it."""
    bandwidth: PositiveFloat
    """Bytes a second in one direction, as sold."""
    reached: Share = 1.0
    """The share of that which collectives sustain."""
    latency: float = Field(ge=0)
    """Seconds of a hop."""


class LinksSettings(Section):
    """What joins the ranks of a run."""

    inside: LinkSettings
    """Between ranks of a node."""
    across: LinkSettings
    """Between nodes, for each rank."""
    ranks_per_node: PositiveInt = 8
    start: float = Field(default=0.0, ge=0)
    """Seconds that any collective takes before its first byte moves."""


class SharesSettings(Section):
    """How much of its best a training step reaches, by what it does; see `planning.speeds.Speeds`."""

    product: Share
    attention: dict[str, Share]
    """By kernel."""
    side: float = Field(default=128.0, ge=0)
    memory: Share = 0.85
    half_length: float = Field(default=512.0, ge=0)
    fp32: Share = 1 / 16
    contention: float = Field(default=0.15, ge=0, le=1)

    @model_validator(mode="after")
    def _kernels_are_known(self) -> Self:
        if set(self.attention) != set(KERNELS):
            raise ValueError(f"attention={sorted(self.attention)} must have a share for each of {', '.join(KERNELS)}")
        return self


class CeilingSettings(Section):
    """The best that somebody measured, which no step can beat."""

    product: PositiveFloat
    """Floating-point operations a second of the best product."""
    bandwidth: PositiveFloat
    """Bytes a second, read and written, of the best copy."""
    source: str
    """Who measured what."""


class DeviceSettings(Section):
    """One rank's device."""

    kind: Literal["cuda", "cpu"]
    """What torch calls it."""
    dtype: Literal["bf16", "fp16", "fp32"]
    """What products take."""
    peak: float = Field(ge=1e3, le=1e30)
    """Floating-point operations a second in `dtype`, as sold; of sparse products none."""
    memory_gib: float = Field(gt=0, le=1e9)
    """As torch finds it."""
    bandwidth: float = Field(ge=1e3, le=1e30)
    """Bytes a second between the device and its memory, as sold."""
    source: str = "as published"
    """Where `peak` is from."""
    links: LinksSettings
    shares: SharesSettings | None = None
    """Left out: all of a step reaches the same share of the peak, as --efficiency says."""
    ceilings: CeilingSettings | None = None
    """Left out: nothing was measured, and floors are told from what is sold."""

    @model_validator(mode="after")
    def _nothing_beats_what_is_sold(self) -> Self:
        if self.ceilings is not None:
            for name, sold in (("product", self.peak), ("bandwidth", self.bandwidth)):
                measured = getattr(self.ceilings, name)
                if measured > sold:
                    key = "peak" if name == "product" else "bandwidth"
                    raise ValueError(f"ceilings.{name}={measured:g} is above {key}={sold:g}; one of them is wrong")
        return self
