"""What a run's own files may say, by type: each is checked when it is read, and what is wrong is named by its key.

Keys that are not named here are free, and so is a file of another version that has more of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from checkpoint.manifest import Damaged, read_json
from data.distances import EDGES
from evals.grid import SHARES_RIGHT
from settings import Refusal

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(ge=-1e60, le=1e60)]
"""What was measured in fp32, with room for sums; NaN and infinities are written as null."""
Text = Annotated[str, Field(max_length=1000)]


class Record(BaseModel):
    """One table of a file, strict in what it names."""

    model_config = ConfigDict(strict=True, extra="allow")


class Row(Record):
    """What every row has: where in the run it was measured."""

    step: Count
    tokens: Count
    stage: Count | None = None


class MetricsRow(Row):
    """A step: a row of metrics.jsonl, and what the report draws of it."""

    sequence_length: Count = 0
    documents: Count | None = None
    distances: list[Count] | None = Field(default=None, max_length=len(EDGES) - 1)
    """Pairs by bucket of their distance; the first are the tokens themselves."""
    skipped_steps: Count | None = None
    skip_reason: Text | None = None
    loss: Number | None = None
    tokens_per_second: Annotated[float, Field(ge=0, le=1e60)] | None = None
    flops_per_token: Annotated[float, Field(ge=0, le=1e60)] | None = None
    mfu: Annotated[float, Field(ge=0, le=1e60)] | None = None
    """Above 1 where a measured peak was too low."""
    padding_share: Annotated[float, Field(ge=0, le=1)] | None = None
    peak_memory_bytes: Count | None = None
    learning_rate: Number | None = None
    gradient_norm: Number | None = None
    max_violation: Number | None = None
    mean_violation: Number | None = None
    load_variation: Number | None = None
    balance_loss: Number | None = None
    router_entropy: Number | None = None
    dead_experts: Number | None = None
    router_z_loss: Number | None = None
    router_logit_max: Number | None = None
    choice_overlap: Number | None = None
    dropped_share: Number | None = None
    null_share: Number | None = None
    bias_min: Number | None = None
    bias_max: Number | None = None

    @model_validator(mode="after")
    def _counts_tokens(self) -> Self:
        if self.distances and not self.distances[0]:
            raise ValueError("distances begin with the tokens themselves, and there are none")
        return self


class EvalsRow(Row):
    """A cell of an evaluation: a row of evals.jsonl."""

    task: Text
    length: Count
    score: Number | None
    depth: Number | None = None
    count: Count | None = None
    moment: Text | None = None
    trained_length: Count | None = None
    layer: Count | None = None
    start: Count | None = None
    stop: Count | None = None
    low: Number | None = None
    high: Number | None = None
    limit: Number | None = None
    before: Number | None = None
    is_met: StrictInt | bool | None = None
    text: Text | None = None
    """A digest of what was read: rows of the same text can be compared piece by piece."""
    pieces: list[Annotated[tuple[Number | None, Number], Field(strict=False)]] | None = None
    """Nats and bytes of stretches of it."""

    @model_validator(mode="after")
    def _has_what_its_task_needs(self) -> Self:
        kind = self.task.partition("/")[0]
        lacking = [key for key in NEEDED.get(kind, ()) if key not in self.model_fields_set]
        if lacking:
            raise ValueError(f"lacks {', '.join(lacking)}, which {kind} has")
        numbers = [key for key in NUMBERS.get(kind, ()) if getattr(self, key) is None]
        if numbers or (self.task == "gate/needle" and self.limit is None):
            raise ValueError(f"{', '.join(numbers) or 'limit'} is no number")
        loads = {key: value for key, value in (self.model_extra or {}).items() if key.startswith("load_")}
        if kind == "routing" and set(loads) != {f"load_{expert}" for expert in range(max(len(loads), 1))}:
            raise ValueError("load_0, load_1 and so on are not one for each expert")
        wrong = [key for key, value in loads.items() if not _is_share(value)]
        if wrong:
            raise ValueError(f"{wrong[0]} is no share")
        return self


NEEDED = dict.fromkeys(SHARES_RIGHT, ("depth", "count")) | {"gate": ("limit",)}
NUMBERS = {"positions": ("start", "stop"), "routing_shift": ("layer",)}
"""Keys of a row by the kind of its task: those that it has, and those that are numbers."""


class KeptRow(EvalsRow):
    """A cell that the next gate compares with."""

    depth: Number | None
    count: Count


class Found(Record):
    """One demand of it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    task: Text
    length: Count
    measured: Number | None
    limit: Number | None
    count: Count
    before: Number | None


class Judged(Record):
    """The verdict of a gate."""

    stage: Count
    sequence_length: Count
    findings: list[Found]


class SkippedSteps(Record):
    """What the next row of metrics.jsonl will say of them."""

    skipped_steps: Count


class Guarded(Record):
    """What the guard remembers."""

    skipped: Count = 0
    in_a_row: Count = 0
    roll_backs: Count = 0
    passed_over: list[Annotated[tuple[Count, Count, Text], Field(strict=False)]] = []
    row: SkippedSteps = SkippedSteps(skipped_steps=0)
    history: dict[str, list[Number]] = {}

    @model_validator(mode="after")
    def _knows_why(self) -> Self:
        if self.in_a_row and not self.passed_over:
            raise ValueError(f"in_a_row={self.in_a_row} steps are skipped, and passed_over names none")
        return self


class State(Record):
    """What state.json of a checkpoint says, of what a run goes on with."""

    step: Count = 0
    tokens: Count = 0
    stage_end: list[KeptRow] = []
    verdict: Judged | None = None
    guard: Guarded = Field(default_factory=Guarded)


class PlannedStage(Record):
    """A stage of config.toml, as far as a report reads it."""

    until_tokens: Count
    sequence_length: Count
    tokens_per_step: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    mixture: dict[str, Number] = {}
    gate: dict[str, Any] = {}


class PlannedContext(Record):
    stages: list[PlannedStage] = []


class Planned(Record):
    """config.toml, as far as a report reads it: also one of another version."""

    name: Text = ""
    total_tokens: Count = 0
    tokens_per_step: Annotated[int, Field(ge=1, lt=2**63)] = 1
    context: PlannedContext = Field(default_factory=PlannedContext)


class BranchedFrom(Record):
    run: Text
    tokens: Count
    step: Count = 0


class Sizes(Record):
    total: Count
    active: Count


class Environment(Record):
    """environment.json, as far as a report, or a run that goes on, reads it."""

    restarts: list[dict[str, Any]] = []
    branched_from: BranchedFrom | None = None
    parameters: Sizes | None = None
    peak_flops: Annotated[float, Field(gt=0, le=1e60)] | None = None
    peak_source: Text | None = None
    routing: Text | None = None


def wrong_with(table: Mapping[str, Any], kind: type[Record]) -> str:
    """What is wrong with a table, in one clause that names the key; nothing where it is one of this kind."""
    try:
        kind.model_validate(table)
    except ValidationError as error:
        problem = error.errors()[0]
        key, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            return f"lacks {key}"
        return f"{key}={problem['input']!r:.60}: {message}" if key else message
    return ""


def read_materials(folder: Path) -> dict[str, str]:
    """What a run's data is, by digest, as its materials.json has it; raises Damaged where that is none."""
    materials = read_json(folder, "materials.json")
    if not isinstance(materials, dict) or not all(isinstance(digest, str) for digest in materials.values()):
        raise Damaged("materials.json is no table of digests")
    return materials


def place_of(state: Mapping[str, Any], where: object) -> tuple[int, int]:
    """(step, tokens) of a checkpoint's state; raises Refusal where it does not say them."""
    lacking = [key for key in ("step", "tokens") if key not in state]
    if lacking:
        raise Refusal(
            f"{where}: state.json lacks {', '.join(lacking)}; put a good copy back, or use another checkpoint"
        )
    return state["step"], state["tokens"]


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e60
