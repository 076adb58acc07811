"""The whole configuration of a run, and what has to hold between its sections."""

import math
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from checkpoint.checkpoints import CheckpointSettings
from context.frequencies import frequencies
from context.reach import notes
from context.rotary import RotaryMap, by_view
from context.stages import ContextSettings, Stage, Stages
from context.step_plan import StepPlan
from data.batches import DataSettings
from evals.suite import EvalsSettings, tasks_of
from model.transformer import ModelSettings
from moe.balance import rows_per_group
from moe.router import evaluation_refusal
from optim.groups import OptimizerSettings
from optim.schedule import check_schedule, learning_rate
from parallel.experts import check_experts
from parallel.mesh import ParallelSettings
from parallel.pipeline import check_pipeline
from parallel.recompute import RecomputeSettings
from parallel.sequence import check_context
from parallel.tensor import check_rows, check_tensor
from run.branch import BranchSettings
from run.deterministic import check_deterministic
from run.gate import check_gates
from run.guard import GuardSettings
from run.initial import InitialSettings
from run.plans import tell_plans, whole_documents
from run.scale import scaled
from run.steps import Amounts, check_amounts
from run.watchdog import WatchdogSettings
from settings import Refusal, Section, nearest, read, to_toml, validate

MOST_RANKS = 1 << 8
"""That hold a row together: how they share it is laid out for all of them, on each."""
MOST_TOKENS = 1 << 28
"""Of a step, for each rank or group of ranks, which takes its rows of a step at once: some 10 GB in its memory."""


class LogSettings(Section):
    every_steps: PositiveInt = 10
    """A row of metrics.jsonl and TensorBoard is written every so many steps."""
    tensorboard: bool = True


class ProfileSettings(Section):
    """A window of steps recorded by torch's profiler into the run's folder."""

    start_step: PositiveInt
    num_steps: PositiveInt = 3


class RunConfig(Section):
    """One run: everything a person chose. What follows from it is a function, never a key."""

    name: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")
    """The run's folder below runs/; left out, the name of the configuration file."""
    total_tokens: PositiveInt
    """What the last stage's `until_tokens` says; like every stage, the run ends with the whole step that reaches it."""
    tokens_per_step: int = Field(gt=0, le=2**40)
    """Tokens in one optimizer step over all ranks and micro-batches; the same at every sequence length."""
    tokens_per_microbatch: int | None = Field(default=None, gt=0, le=2**40)
    """Tokens of one forward and backward; left out, a rank's whole share of the step."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    model: ModelSettings
    initial: InitialSettings | None = None
    """Left out: the first weights are drawn."""
    branch: BranchSettings | None = None
    """Left out: the run begins with its first stage."""
    context: ContextSettings
    data: DataSettings
    optimizer: OptimizerSettings
    evals: EvalsSettings = EvalsSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA and on CPUs with AMX, else fp32. Weights and moments are fp32 either way."""
    threads: int | None = Field(default=None, ge=1, le=4096)
    """CPU threads of each rank; left out, all cores shared among the ranks of this machine."""
    compile: bool = False
    """Compile the position-wise part of each layer with torch.compile."""
    recompute: RecomputeSettings = "none"
    """What of each layer is computed again in the backward pass, to keep less for it. "full": all but the choice of
    experts; "ops": all but that, attention, and what ranks send each other for either; { budget = "20 GB" }: of each
    layer as little as a rank's memory allows. true, as was written once, is "ops"."""
    offload: bool = False
    """Keep in host memory what the backward pass will need; copies overlap with computation. On CPUs nothing moves."""
    parallel: ParallelSettings = ParallelSettings()
    loss_chunk: PositiveInt = 4096
    """Tokens whose logits exist at one time."""
    profile: ProfileSettings | None = None
    guard: GuardSettings = GuardSettings()
    watchdog: WatchdogSettings = WatchdogSettings()
    deterministic: bool = False
    """The same bits at every run on the same machine; an operator that cannot is refused by name. It may be slower."""
    trial: bool = True
    """Try the largest micro-batch of every stage to come before the first step: lack of memory then shows at once."""

    @property
    def stages(self) -> Stages:
        """The stages placed in the run."""
        return Stages(self.context.stages, self.tokens_per_step)

    def row_ranks(self, stage: Stage) -> int:
        """How many ranks hold each row together in this stage."""
        return stage.settings.context or self.parallel.context

    @property
    def all_row_ranks(self) -> dict[int, str]:
        """How many ranks hold each row together in some stage, and the key that says so."""
        return {
            self.row_ranks(stage): f"context.stages.{stage.index}.context"
            if stage.settings.context
            else "parallel.context"
            for stage in reversed(list(self.stages))
        }

    @model_validator(mode="after")
    def check_steps(self) -> "RunConfig":
        amounts = Amounts(self.context.stages, self.tokens_per_step, self.tokens_per_microbatch, self.total_tokens)
        check_amounts(amounts)
        check_schedule(self.optimizer.schedule, self.total_tokens)
        return self

    @model_validator(mode="after")
    def check_determinism(self) -> "RunConfig":
        if self.deterministic:
            check_deterministic(self.model)
        return self

    @model_validator(mode="after")
    def check_branch(self) -> "RunConfig":
        last = len(self.context.stages) - 1
        if self.branch is not None and self.branch.stage > last:
            raise ValueError(
                f"branch.stage={self.branch.stage} must be the number of a stage, and the last is context.stages.{last}"
            )
        check_gates(self.context.stages, self.evals)
        return self

    @model_validator(mode="after")
    def check_parallel(self) -> "RunConfig":
        check_experts(self.parallel, self.model.moe.num_experts if self.model.moe else None)
        for size, key in self.all_row_ranks.items():
            if size > MOST_RANKS:
                raise ValueError(f"{key}={size} is above {MOST_RANKS}, the most ranks that can hold a row together")
            check_context(self.parallel.model_copy(update={"context": size}), self.model, key)
        check_tensor(self.parallel, self.model)
        check_pipeline(self.parallel, self.model, self.tokens_per_microbatch, compile=self.compile)
        for step in self.stages.first_steps():
            check_rows(self.parallel, step.sequence_length, self.row_ranks(step.stage), step.length_key)
        return self

    @model_validator(mode="after")
    def check_routing(self) -> "RunConfig":
        moe = self.model.moe
        if moe is None:
            return self
        for number, rule in enumerate(moe.balance):
            for step in self.stages.first_steps():
                try:
                    if rule.kind == "loss":
                        rows_per_group(rule, step.num_samples, step.sequence_length)
                except Refusal as refusal:
                    raise ValueError(f"model.moe.balance.{number}: {refusal}") from None
        reason = evaluation_refusal(moe.router)
        if reason is not None and tasks_of(self.evals):
            raise ValueError(f"evals asks for {', '.join(tasks_of(self.evals))}: {reason}")
        return self

    @model_validator(mode="after")
    def check_rotation(self) -> "RunConfig":
        views = {self.model.view(layer) for layer in range(self.model.num_layers)}
        for number, stage in enumerate(self.context.stages):
            is_map = isinstance(stage.rotary, RotaryMap)
            for view, spec in by_view(stage.rotary).items():
                key = f"context.stages.{number}.rotary" + (f".{view}" if is_map else "")
                if is_map and view not in views:
                    raise ValueError(f"{key}: the model has no {view} layers; give one rotation in place of two")
                try:
                    frequencies(spec, self.model.rotary_channels)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from None
        return self

    @model_validator(mode="after")
    def check_sources(self) -> "RunConfig":
        sources = self.data.sources
        for number, stage in enumerate(self.context.stages):
            key, own = f"context.stages.{number}", {name: source.weight for name, source in sources.items()}
            for table, names in (("mixture", stage.mixture), ("buckets", stage.buckets)):
                for name in names:
                    if name not in sources:
                        raise ValueError(f"{key}.{table}.{name}: no source of that name{nearest(name, list(sources))}")
            for name in stage.buckets:
                if not (stage.mixture or own).get(name):
                    raise ValueError(
                        f"{key}.buckets.{name}: the stage takes nothing of this source; give it a share in "
                        f"{key}.mixture, or leave its buckets out"
                    )
        return self


def rows_of_step(config: RunConfig, step: StepPlan, world_size: int) -> int:
    """Rows in a micro-batch of one rank in this step; raises Refusal where the step does not divide among the ranks.

    world_size: ranks, or groups of them that hold their rows together.
    """
    tokens = config.tokens_per_microbatch or max(step.num_tokens // world_size, 1)
    if tokens % step.sequence_length or step.num_tokens % (tokens * world_size):
        size = config.row_ranks(step.stage)
        alike = [s for s in config.stages.first_steps() if s.stage.step_key == step.stage.step_key]
        shares = [world_size * size // config.row_ranks(s.stage) for s in alike]
        rows = [config.tokens_per_microbatch or s.sequence_length for s in alike]
        together = math.lcm(*(share * tokens for share, tokens in zip(shares, rows, strict=True) if share))
        near = max(1, round(step.num_tokens / together)) * together
        who = "ranks" if size == 1 else f"groups of {config.all_row_ranks[size]}={size} ranks"
        raise Refusal(
            f"{step.stage.step_key}={step.num_tokens} does not divide among {world_size} {who} into micro-batches of "
            f"whole rows of {step.sequence_length} tokens; try {step.stage.step_key}={near}, other ranks or another "
            f"tokens_per_microbatch (now {config.tokens_per_microbatch or 'left out'})"
        )
    if step.num_tokens // world_size > MOST_TOKENS:
        raise Refusal(
            f"{step.stage.step_key}={step.num_tokens} gives each of {world_size} ranks more than {MOST_TOKENS} tokens "
            "to hold at once; use smaller steps or more ranks"
        )
    return tokens // step.sequence_length


def rate_of_step(config: RunConfig, step: StepPlan) -> float:
    """The learning rate of a step, by the tokens at its end: the stage's own schedule, or else the run's."""
    rate = step.stage.learning_rate(step.end_tokens)
    if rate is not None:
        return rate
    schedule = config.optimizer.schedule
    return config.optimizer.learning_rate * learning_rate(schedule, step.end_tokens, config.total_tokens)


def load_config(path: Path | str, overrides: list[str]) -> RunConfig:
    """The resolved configuration of a run; left out, its name is made of the file's. Raises Refusal."""
    config = validate(scaled(read(path, overrides), str(path)), RunConfig, str(path))
    name = config.name or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).stem).strip("-._") or "run"
    return config.model_copy(update={"name": name})


def show(config: RunConfig) -> None:
    """Print the resolved configuration as TOML, then in comments its stages and what ranks would do of a whole row."""
    print(to_toml(config))
    stages = config.stages
    for row in stages.rows():
        print("# " + "; ".join(f"{title}: {text}" for title, text in row.items()))
    for stage in stages:
        for note in notes(stage.rotary, config.model.rotary_channels, stage.sequence_length):
            print(f"# stage {stage.index}, rotary: {note}")
    for line in tell_plans(config.model, config.parallel, stages, config.row_ranks, whole_documents):
        print(f"# {line}")
