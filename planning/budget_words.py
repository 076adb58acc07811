"""What to train for a budget, as text: what the law says, and overrides to paste behind a configuration."""

import argparse
import json
import math
import shlex
from collections.abc import Iterator
from typing import Any

from planning.budget import FITTED_FLOPS, STEP_LAW_SIZES, Budget, Sized, budget_of, for_hours, sized
from planning.device import published, with_efficiency, with_rate
from planning.given import choose, choose_ranks, in_nodes, vocabulary, what_speeds_mean
from run.config import RunConfig, load_config
from run.metrics import clock, short
from scaling.repeats import HALF_LIFE, worth
from scaling.sets import DEFAULT_SET, CoefficientSet, coefficient_set, step_law_rate
from settings import Refusal, to_dict


def plan_budget(arguments: argparse.Namespace) -> Iterator[str]:
    """What to train; with a configuration, as large as that, and how long it takes. Raises Refusal."""
    coefficients = coefficient_set(arguments.coefficients or DEFAULT_SET)
    check(arguments)
    if arguments.config is None:
        yield from _without_pattern(arguments, coefficients)
        return
    config = load_config(arguments.config, arguments.overrides)
    vocab_size = vocabulary(config)
    num_ranks, device = choose_ranks(config, arguments.ranks), choose(config, arguments)

    def at(flops: float) -> Sized:
        budget = budget_of(flops, coefficients, arguments.unique_tokens)
        return sized(config, vocab_size, budget, num_ranks, device)

    flops = arguments.flops
    if flops is None:
        wanted = 3600 * arguments.hours
        flops = for_hours(wanted, wanted * num_ranks * device.rate, lambda flops: at(flops).seconds)
    in_range(flops)
    found = at(flops)
    yield from in_words(found.budget, coefficients)
    yield from _shape_in_words(arguments, config, found, f"{num_ranks} x {device.name}")
    yield from what_speeds_mean(found.config, device)


def _without_pattern(arguments: argparse.Namespace, coefficients: CoefficientSet) -> Iterator[str]:
    flops = arguments.flops
    if flops is None:
        if arguments.device is None and arguments.rate is None:
            raise Refusal("--hours: give --device h200 or another, or --rate, or a configuration, to know how fast")
        device = in_nodes(published(arguments.device or "h100"), arguments.ranks_per_node)
        device = device if arguments.rate is None else with_rate(device, arguments.rate)
        device = device if arguments.efficiency is None else with_efficiency(device, arguments.efficiency)
        ranks = arguments.ranks or 1
        flops = 3600 * arguments.hours * ranks * device.rate
        speed = f"{short(device.rate)} FLOP/s each, {device.efficiency:.0%} of {short(device.peak)} ({device.source})"
        yield f"{arguments.hours:g} hours of {ranks} x {device.name} at {speed};"
        yield "with a configuration its own predicted speed is taken"
    in_range(flops)
    yield from in_words(budget_of(flops, coefficients, arguments.unique_tokens), coefficients)


def in_range(flops: float) -> None:
    """Refuse what no run is made of."""
    low, high = BUDGETS
    if not low <= flops <= high:
        raise Refusal(f"{flops:.3g} FLOPs: no budget of a run; give --flops (or --hours) for {low:g} to {high:g}")


def in_words(budget: Budget, coefficients: CoefficientSet) -> Iterator[str]:
    """What the law says, whose it is, and how far it can be trusted."""
    N, D = budget.parameters, budget.tokens
    rate, batch = step_law_rate(N, D), budget.batch_tokens
    yield f"{budget.flops:.3g} FLOPs, 6ND, by the set {coefficients.name!r}:"
    yield f"  {coefficients.source}"
    yield f"  N  {short(N)} parameters that a token meets"
    yield f"  D  {short(D)} tokens, {D / N:.1f} a parameter; loss of the law {budget.loss:.3f} nats a token"
    if budget.unique is not None:
        fresh = worth(budget.unique, budget.epochs) if budget.unique < D else D
        yield (
            f"     {budget.epochs:.2f} passes over {short(budget.unique)} tokens, worth {short(fresh)} new ones"
            f" (half-life {HALF_LIFE:g}, Muennighoff et al. 2023)"
        )
    yield f"  batch {short(batch)} tokens, {D / batch:,.0f} steps; peak learning rate {rate:.2e}"
    yield "     (Step Law: Li et al. 2025, equation 1)"
    low, high = FITTED_FLOPS
    if not low <= budget.flops <= high:
        by, side = (low / budget.flops, "below") if budget.flops < low else (budget.flops / high, "above")
        yield f"  ! the law was fitted to runs of {low:g} to {high:g} FLOPs: this is {by:,.3g} times {side}"
    low, high = STEP_LAW_SIZES
    if not low <= N <= high:
        yield (
            f"  ! batch and rate were fitted at {short(low)} to {short(high)} parameters (without embeddings) and"
            " AdamW: sweep around them"
        )


def _shape_in_words(arguments: argparse.Namespace, config: RunConfig, found: Sized, where: str) -> Iterator[str]:
    model, size, before = found.config.model, found.size, config.model
    inner = size.active - size.embedding
    rate = step_law_rate(inner, found.budget.tokens)
    yield ""
    yield f"After the pattern of {config.name}: {before.num_layers} layers of {before.width} become"
    parameters = f"of {short(size.total)} parameters a token meets {short(size.active)}"
    yield f"  {model.num_layers} layers of {model.width}; {parameters}"
    if model.moe is not None:
        yield (
            "  ! N is what a token meets. The sets are of dense models: a mixture with as many active parameters has a"
            " lower loss, and an optimum of its own (python -m scaling fit --law joint_moe)"
        )
    yield (
        f"  {found.flops:.3g} FLOPs by its own count, with attention and without the embedding's rows;"
        f" {clock(found.seconds)} on {where}"
    )
    if config.optimizer.kind != "adamw":
        yield f"  ! the rate is AdamW's; {config.optimizer.kind} wants its own"
    yield ""
    yield shlex.join(pasted(arguments, config, found.config, rate))
    yield ""


def pasted(arguments: argparse.Namespace, config: RunConfig, given: RunConfig, rate: float) -> list[str]:
    """What to write behind the command's own overrides, read again by the way that train.py goes."""
    words = list(arguments.overrides)
    plain = load_config(arguments.config, [*words, "scale=1"])  # the numbers of the file, which a scale would divide
    told = ["scale=1"] if plain != config else []
    told += overrides_of(plain, given, rate)
    again = load_config(arguments.config, [*words, *told])
    assert (again.model, again.total_tokens, again.context) == (given.model, given.total_tokens, given.context), told
    return told


def overrides_of(config: RunConfig, given: RunConfig, rate: float) -> list[str]:
    """What to write behind the file's name for it."""
    told = [f"optimizer.learning_rate={rate:.2e}"]
    before, after = dict(_numbers(to_dict(config))), dict(_numbers(to_dict(given)))
    told += [f"{key}={_written(value)}" for key, value in after.items() if before.get(key) != value]
    return told + [f"{key}=none" for key in before if key not in after]


def _written(value: Any) -> str:
    """As an override has it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a table, with their paths."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, inner in enumerate(value):
            yield from _numbers(inner, f"{key}.{number}")
    else:
        yield key, value


BUDGETS = (1e9, 1e36)
"""FLOPs of any run, from a few steps of a toy to beyond what there is."""


def check(arguments: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing."""
    if arguments.flops is not None and arguments.hours is not None:
        raise Refusal("--flops and --hours: give one of them")
    for name in ("flops", "hours", "unique_tokens"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise Refusal(f"--{name.replace('_', '-')} {value:g}: give a number above 0")
    if arguments.ranks is not None and arguments.ranks < 1:
        raise Refusal(f"--ranks {arguments.ranks}: give 1 or more")
