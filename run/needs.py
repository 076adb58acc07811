"""How much memory a rank needs for a step, from the configuration alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from context.step_plan import StepPlan
from model.block import Kind
from model.kept import Numbers
from model.memory import Memory, by_kind, memory, states
from model.repeated import repeated_by_layer
from model.share import Share, States
from parallel.budget import Layer, cheapest
from parallel.mesh import Grid, grid_of
from parallel.pipeline_part import layers_of
from parallel.recompute import KINDS
from parallel.states import states_by_stage
from run.config import RunConfig, rows_of_step
from settings import Refusal


def needs_of(  # noqa: PLR0917 (a step, and all that it depends on)
    config: RunConfig,
    vocab_size: int,
    step: StepPlan,
    num_ranks: int,
    numbers: Numbers,
    kinds: tuple[Kind, ...] | None = None,
) -> Memory:
    """Bytes of the one of `num_ranks` ranks that needs most in a micro-batch of this step.

    kinds: those of `kinds_of`, where they are known. Raises Refusal where the ranks, or the step, do not divide, and
    where the memory budget is too small.
    """
    shares = shares_of(config, vocab_size, step, num_ranks, numbers)
    kinds = kinds or kinds_of(config, vocab_size, step, num_ranks, numbers)
    needed = (_memory(config, vocab_size, replace(share, recompute=kinds)) for share in shares)
    return max(needed, key=lambda each: each.total)


def kinds_of(config: RunConfig, vocab_size: int, step: StepPlan, num_ranks: int, numbers: Numbers) -> tuple[Kind, ...]:
    """What is computed again of each layer in such a step; of a budget, by what each rank's layers need.

    Raises Refusal where not even the most that can be computed again would keep to it.
    """
    chosen: list[Kind] = [kind_of(config)] * config.model.num_layers
    if isinstance(config.recompute, str):
        return tuple(chosen)
    short = 0
    for share in shares_of(config, vocab_size, step, num_ranks, numbers):
        here = share.layers or range(config.model.num_layers)
        kinds = _within(config, vocab_size, step, share, config.recompute.bytes)
        if kinds is None:
            short = max(short, _memory(config, vocab_size, share).total)
            continue
        for layer, kind in zip(here, kinds, strict=True):
            chosen[layer] = kind
    if short:
        near = -(-short // 10**8) / 10
        raise Refusal(
            f"recompute.budget={config.recompute.budget!r}: in context.stages.{step.stage.index} a rank needs"
            f' {gigabytes(short)} with every layer at "full", where the least is kept; set'
            f' recompute.budget="{near:g} GB", or a smaller tokens_per_microbatch, or share the model among more ranks'
            " (python plan.py shows what needs how much)"
        )
    return tuple(chosen)


def _within(config: RunConfig, vocab_size: int, step: StepPlan, share: Share, budget: int) -> tuple[Kind, ...] | None:
    """Of this rank's layers; None where nothing keeps to the budget."""
    model, here = config.model, tuple(share.layers or range(config.model.num_layers))
    if share.states is None:  # which are of a model that is built each time
        weights, moments = states(model, vocab_size, config.optimizer.kind, share.expert_ranks)
        share = replace(share, states=States(weights, moments, weights if share.num_ranks > 1 else 0))
    lengths, device = (step.sequence_length,), share.numbers.device

    def fits(kinds: Sequence[Kind]) -> bool:
        by_layer: list[Kind] = ["full"] * model.num_layers
        for layer, kind in zip(here, kinds, strict=True):
            by_layer[layer] = kind
        return _memory(config, vocab_size, replace(share, recompute=by_layer)).total <= budget

    def layer_of(layer: int) -> Layer:
        kept, moment = by_kind(model, layer, share)
        flops = {kind: repeated_by_layer(model, layer, kind, device, lengths, step.window) for kind in KINDS}
        return Layer(kept, moment, flops)

    return cheapest([layer_of(layer) for layer in here], fits) if fits(["full"] * len(here)) else None


def _memory(config: RunConfig, vocab_size: int, share: Share) -> Memory:
    return memory(config.model, vocab_size, config.optimizer.kind, share)


def shares_of(config: RunConfig, vocab_size: int, step: StepPlan, num_ranks: int, numbers: Numbers) -> Iterator[Share]:
    """What a rank is given to do at a time, for each place along the pipeline."""
    grid = grid_of(config.parallel, num_ranks)
    share, stages = share_of(config, step, grid, numbers), grid.pipeline
    if num_ranks == 1:
        yield share
        return
    parts = parts_per_rank(config)
    held = states_by_stage(config.model, vocab_size, config.optimizer.kind, grid, parts)
    number = microbatches_of(config, step, grid)
    for place in range(stages):
        own = range(place, stages * parts, stages)
        layers = tuple(layer for part in own for layer in layers_of(part, stages * parts, config.model.num_layers))
        yield replace(
            share,
            layers=layers,
            has_embedding=place == 0,
            has_head=place == stages - 1,
            in_flight=in_flight(place, stages, parts, number),
            states=held[place],
        )


def share_of(config: RunConfig, step: StepPlan, grid: Grid, numbers: Numbers) -> Share:
    """What every one of the ranks is given to do at a time, wherever it stands along the pipeline."""
    row_ranks, sequence = config.row_ranks(step.stage), config.parallel.sequence
    num_rows = rows_of_step(config, step, grid.data // row_ranks)
    kinds = {kind.removesuffix("_nope") for kind in config.model.pattern}
    return Share(
        num_tokens=num_rows * step.sequence_length // row_ranks,
        numbers=numbers,
        recompute=kind_of(config),
        offload=config.offload,
        loss_chunk=config.loss_chunk,
        has_earlier=grid.pipeline > 1 or microbatches_of(config, step, grid) > 1,
        num_ranks=grid.size,
        expert_ranks=grid.expert,
        expert_shard_ranks=grid.length("expert_shard"),
        shard_ranks=grid.shard,
        stays_whole=grid.pipeline > 1,
        tensor_ranks=grid.tensor,
        row_ranks=row_ranks,
        methods=tuple(getattr(sequence, kind) for kind in sorted(kinds)),
    )


def kind_of(config: RunConfig) -> Kind:
    """What is computed again of every layer; of a budget, by which each has its own (`kinds_of`), the most."""
    return config.recompute if isinstance(config.recompute, str) else "full"


def parts_per_rank(config: RunConfig) -> int:
    """Of the model on each rank of a pipeline."""
    pipelining = config.parallel.pipelining
    return 1 if config.parallel.pipeline == 1 or pipelining.schedule == "1f1b" else pipelining.parts_per_rank


def microbatches_of(config: RunConfig, step: StepPlan, grid: Grid) -> int:
    """How many micro-batches each rank takes in a step."""
    groups = grid.data // config.row_ranks(step.stage)
    return step.num_samples // (rows_of_step(config, step, groups) * groups)


def in_flight(place: int, stages: int, parts: int, number: int) -> float:
    """How many of `number` micro-batches a rank holds activations of at most, as if each filled all of its layers.

    One forward, one backward: as many as there are ranks from here on. With several parts on a rank, each counts as one
    of them, and they go in rounds (Narayanan et al. 2021, section 2.2).
    """
    if stages == 1:
        return 1.0
    if parts == 1:
        return float(min(number, stages - place))
    return min(number * parts, 2 * (stages - place - 1) + (parts - 1) * stages + 1) / parts


def gigabytes(count: float) -> str:
    """`12.3 GiB`, `-45.6 MiB`: three digits of so many bytes."""
    if count < 0:
        return f"-{gigabytes(-count)}"
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
