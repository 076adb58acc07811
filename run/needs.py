"""How much memory a rank needs for a step, from the configuration alone."""

from context.step_plan import StepPlan
from model.kept import Numbers
from model.memory import Memory, Share, memory
from run.config import RunConfig, rows_of_step


def needs_of(config: RunConfig, vocab_size: int, step: StepPlan, num_ranks: int, numbers: Numbers) -> Memory:
    """Bytes of one of `num_ranks` ranks in a micro-batch of this step; raises Refusal where it does not divide."""
    return memory(config.model, vocab_size, config.optimizer.kind, share_of(config, step, num_ranks, numbers))


def share_of(config: RunConfig, step: StepPlan, num_ranks: int, numbers: Numbers) -> Share:
    """What one of `num_ranks` ranks is given to do at a time."""
    row_ranks, sequence = config.row_ranks(step.stage), config.parallel.sequence
    num_rows = rows_of_step(config, step, num_ranks // row_ranks)
    kinds = {kind.removesuffix("_nope") for kind in config.model.pattern}
    return Share(
        num_tokens=num_rows * step.sequence_length // row_ranks,
        numbers=numbers,
        recompute=config.recompute,
        loss_chunk=config.loss_chunk,
        num_ranks=num_ranks,
        expert_ranks=config.parallel.expert,
        row_ranks=row_ranks,
        methods=tuple(getattr(sequence, kind) for kind in sorted(kinds)),
    )


def gigabytes(count: float) -> str:
    """`12.3 GiB`, `45.6 MiB`: three digits of so many bytes."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
