"""Sharper scores far into a text: a softmax over more keys is flatter; queries that grow with position undo that."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from settings import Section


class StepTemperature(Section):
    """1 + beta * log(1 + floor(tokens up to here / length)): Llama 4 (its released code), after Nakanishi 2025."""

    kind: Literal["steps"] = "steps"
    length: int = Field(ge=1)
    """Tokens of one step; queries before the first stay as they are. Llama 4: 8192."""
    beta: float = Field(default=0.1, gt=0)
    where: Literal["everywhere", "unrotated"] = "everywhere"
    """Which layers: all, or those without a rotation, as in Llama 4."""


class LogTemperature(Section):
    """log(tokens up to here) / log(length), at least 1: scores in proportion to the logarithm of the number of keys
    (Chiang and Cholak 2022, section 5.3), from a length on that training knew (Qwen's log-n attention)."""

    kind: Literal["log"] = "log"
    length: int = Field(ge=2)
    """Tokens up to which queries stay as they are."""
    where: Literal["everywhere", "unrotated"] = "everywhere"
    """Which layers: all, or those without a rotation."""


TemperatureSettings = Annotated[StepTemperature | LogTemperature, Field(discriminator="kind")]


def scaled(settings: TemperatureSettings, q_BTHC: Tensor, positions_BT: Tensor) -> Tensor:
    """The queries times what their positions (0 is a document's first token) call for; same shape and dtype."""
    factor_BT = FACTORS[settings.kind](settings, positions_BT + 1)
    return (q_BTHC * factor_BT[..., None, None]).to(q_BTHC.dtype)


def _steps(settings: StepTemperature, counts_BT: Tensor) -> Tensor:
    return 1 + settings.beta * (counts_BT // settings.length).float().log1p()


def _log(settings: LogTemperature, counts_BT: Tensor) -> Tensor:
    return (counts_BT.float().log() / math.log(settings.length)).clamp(min=1.0)


FACTORS: dict[str, Callable[[Any, Tensor], Tensor]] = {"steps": _steps, "log": _log}
