"""What the arms of a comparison have in common besides their size, and what they have not."""

from collections.abc import Iterator, Sequence

from run.config import RunConfig
from settings import differences

SIZE = ("model.", "model:")
NO_MATTER = ("name", "branch", "log", "checkpoint", "device", "threads", "watchdog", "profile", "trial", "parallel")
"""Keys that change no number of a run, or only where it is written."""
SHOWN = 6


def alike_lines(name: str, config: RunConfig, beside: str, other: RunConfig) -> Iterator[str]:
    """Which data, tokens, steps and schedule an arm shares with another, and every key but its model's that differs.

    The order of the data is a function of the seed, the stage and the data alone, so that runs which share these see
    the same rows at every step.
    """
    lines = [line for line in differences(other, config) if line.partition(":")[0].split(".")[0] not in NO_MATTER]
    others = [line for line in lines if not line.startswith(SIZE)]
    if not others:
        steps = sum(stage.num_steps for stage in config.stages)
        yield (
            f"{name} and {beside}: the same data in the same order, {config.total_tokens:,} tokens in {steps:,} steps, "
            "stages, schedule and evaluations"
        )
        return
    yield f"{name} and {beside}: unmatched besides size: {_first(others)}"
    shared = [said for said, keys in SHARED if not any(line.startswith(keys) for line in others)]
    if shared:
        yield f"  the same: {', '.join(shared)}"


SHARED = (
    ("data and its order", ("data", "seed", "context.stages", "tokens_per_step")),
    ("tokens", ("total_tokens",)),
    ("tokens of a step", ("tokens_per_step",)),
    ("stages", ("context",)),
    ("schedule", ("optimizer.schedule", "total_tokens", "context.stages")),
    ("evaluations", ("evals",)),
)
"""What is said to be the same where no key of these differs."""


def _first(lines: Sequence[str]) -> str:
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more
