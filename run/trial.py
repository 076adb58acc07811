"""The largest batch first: what does not fit into memory is refused at the start, not when its stage comes."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice

import torch

from context.step_plan import StepPlan
from data.batches import Batches
from evals.suite import tasks_of
from model.kept import Numbers
from model.transformer import Transformer
from optim.groups import Optimizer
from parallel.recompute import KINDS
from parallel.sequence import split_attention
from parallel.whole import is_in_parts, whole_model
from run.config import rows_of_step
from run.demand import demand_of
from run.entry import take_shape
from run.microbatches import forward, loss_of, split
from run.needs import gigabytes, kind_of, needs_of
from run.pipeline_pass import num_to_rehearse, rehearse
from run.start import Run
from settings import Refusal

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch says where the system, or a device, has no more of it."""


def try_batches(model: Transformer, optimizer: Optimizer, batches: Batches, run: Run, tokens: int) -> None:
    """One forward and backward pass of the largest micro-batch of every stage after so many tokens, largest first.

    Of real rows, as taking them moves nothing on; beside gradients and moments, as it will be. Nothing is left of it:
    no gradient, no state. Raises Refusal where memory runs out.
    """
    steps = largest_steps(run, tokens) if run.config.trial else []
    if not steps:
        return
    start, rotary, group = time.monotonic(), model.rotary, run.row_group
    for step in steps:
        what = (
            f"context.stages.{step.stage.index}: {_in_words(run, step)}, for which by arithmetic"
            f" {gigabytes(_needed(model, run, step))} are needed,"
        )
        ways = _ways_out(model, run, step)
        with refusing_without_memory(what, ways, run), beside_the_rest(model, optimizer, run, step):
            take_shape(model, run, step.stage)
            forward_and_backward(model, batches, run, step)
    model.rotary, run.row_group = rotary, group
    split_attention(model, group)
    try_to_ask(model, optimizer, run, steps[0])
    run.say(f"trial: {_in_words(run, steps[0])} fits{_peak(run)}; {time.monotonic() - start:.1f} s")
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)


def try_to_ask(model: Transformer, optimizer: Optimizer, run: Run, step: StepPlan) -> None:
    """Bring the whole model together once where evaluations will: what does not fit may not show at a stage's end."""
    if not (tasks_of(run.config.evals) and is_in_parts(run.mesh)):
        return
    size = sum(layout.shape.numel() * layout.dtype.itemsize for layout in run.layouts.values())
    what = f"the whole model, {gigabytes(size)}, which evaluations ask on each rank,"
    way = "evals.tasks=[] here and python -m evals on the checkpoints"
    with refusing_without_memory(what, [way], run), beside_the_rest(model, optimizer, run, step):
        optimizer.zero_grad()  # gradients are gone by then
        with whole_model(model, run.mesh, run.layouts):
            pass


def largest_steps(run: Run, tokens: int) -> list[StepPlan]:
    """A step of the longest rows of every stage that is not over; one for each shape of a micro-batch, largest first.

    The shorter rows of a stage come in micro-batches of as many tokens, which need no more.
    """
    shapes: dict[tuple[int, ...], StepPlan] = {}
    for step in (stage.longest_step() for stage in run.config.stages if stage.until_tokens > tokens):
        size, length = run.config.row_ranks(step.stage), step.sequence_length
        shapes.setdefault((_num_rows(run, step) * length // size, length, size), step)
    return [shapes[shape] for shape in sorted(shapes, reverse=True)]


def forward_and_backward(model: Transformer, batches: Batches, run: Run, step: StepPlan) -> None:
    """Of one micro-batch of the step's shape, as in training, or of as many as fill a pipeline."""
    num_rows, groups, demand = _num_rows(run, step), run.groups, demand_of(step, batches)
    number = num_to_rehearse(run, step) if run.mesh.grid.pipeline > 1 else 1
    rows = batches.take(demand, 0, num_rows * groups.size * number, num_rows, groups.rank, groups.size)
    microbatches = [batch.to(run.device) for batch in split(rows, step, run)]
    # Compiled kernels depend on which shapes came first: they are left to the run itself.
    with torch.compiler.set_stance("force_eager") if run.config.compile else nullcontext():
        if run.mesh.grid.pipeline > 1:
            rehearse(model, microbatches, run, step.window)
        else:
            hidden_BTD, _ = forward(model, microbatches[0], run, step.window)
            loss_of(model, hidden_BTD, microbatches[0], run).weighted.backward()


@contextmanager
def beside_the_rest(model: Transformer, optimizer: Optimizer, run: Run, step: StepPlan) -> Iterator[None]:
    """Inside, as much memory is taken as gradients of earlier micro-batches and the optimizer's moments will take."""
    was_training, config = model.training, run.config
    has_earlier = step.num_samples > _num_rows(run, step) * run.num_groups(step.stage)
    has_moments = any(inner.state for inner in optimizer.optimizers)
    numbers = Numbers(run.dtype.itemsize, run.device.type)
    moments = needs_of(config, model.vocab_size, step, run.world.size, numbers).moments
    try:
        model.train()
        taken = torch.empty(0 if has_moments else moments, dtype=torch.uint8, device=run.device)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if has_earlier else None
        yield
        del taken
    finally:
        optimizer.zero_grad()
        model.train(was_training)


@contextmanager
def refusing_without_memory(what: str, ways: Sequence[str], run: Run) -> Iterator[None]:
    """Make a refusal that says what was tried, and the ways out, of an error that says that memory ran out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not any(words in said for words in NO_MEMORY):
            raise
        raise Refusal(
            f"{what} does not fit into the memory of {run.device}; try {' or '.join(ways)} (python plan.py shows what"
            f" needs how much). torch says: {said.split(' Including ')[0][:300]}"
        ) from None


def _ways_out(model: Transformer, run: Run, step: StepPlan) -> list[str]:
    size = run.config.row_ranks(step.stage)
    now = kind_of(run.config)
    ways = [f"recompute={kind}" for kind in KINDS[KINDS.index(now) + 1 :]]
    ways += [f"tokens_per_microbatch={tokens}" for tokens in islice(_smaller(model, run, step), 1)]
    return [*ways, f"context.stages.{step.stage.index}.context={2 * size} on {2 * size} ranks or more"]


def _smaller(model: Transformer, run: Run, step: StepPlan) -> Iterator[int]:
    """Tokens of smaller micro-batches of whole rows of every length, largest first, as far as they may fit."""
    lengths = {each.sequence_length for each in run.config.stages.first_steps()}
    num_rows, room = _num_rows(run, step), math.inf
    if run.device.type == "cuda":
        _, room = torch.cuda.mem_get_info(run.device)
    for tokens in (step.sequence_length * rows for rows in range(num_rows - 1, 0, -1) if num_rows % rows == 0):
        if not any(tokens % length for length in lengths) and _needed(model, run, step, tokens) <= room:
            yield tokens


def _needed(model: Transformer, run: Run, step: StepPlan, tokens: int | None = None) -> int:
    """Bytes by arithmetic, of the step's own micro-batches or of some of so many tokens."""
    numbers = Numbers(run.dtype.itemsize, run.device.type)
    config = run.config if tokens is None else run.config.model_copy(update={"tokens_per_microbatch": tokens})
    return needs_of(config, model.vocab_size, step, run.world.size, numbers).total


def _num_rows(run: Run, step: StepPlan) -> int:
    return rows_of_step(run.config, step, run.num_groups(step.stage))


def _in_words(run: Run, step: StepPlan) -> str:
    num_rows, size = _num_rows(run, step), run.config.row_ranks(step.stage)
    over = f" over {size} ranks" if size > 1 else ""
    return f"a micro-batch of {num_rows} x {step.sequence_length:,} tokens{over}"


def _peak(run: Run) -> str:
    if run.device.type != "cuda":
        return ""
    _, total = torch.cuda.mem_get_info(run.device)
    return f" into {gigabytes(torch.cuda.max_memory_allocated(run.device))} of {gigabytes(total)}"
