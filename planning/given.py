"""What a plan is made for: so many ranks of a device, and documents as they are, or as if every row were one."""

import argparse
import math
from dataclasses import replace

from data.batches import Batches
from data.tokenizer import build_tokenizer
from moe.words import routing_in_words
from planning.device import Device, published, this_device, with_efficiency, with_rate
from planning.forecast import DocumentsOf, documents_in, whole_rows
from run.config import RunConfig
from run.demand import demand_of
from run.metrics import short
from run.start import choose_device, choose_dtype
from settings import Refusal


def fewest_ranks(config: RunConfig) -> int:
    """The fewest ranks that divide into the groups of the configuration."""
    parallel = config.parallel
    data = math.lcm(parallel.shard * (parallel.replicate or 1), parallel.expert, *config.all_row_ranks)
    return parallel.tensor * parallel.pipeline * data


def choose_ranks(config: RunConfig, wanted: int | None) -> int:
    """As many ranks as are wanted, or the fewest; raises Refusal for a number that does not divide into the groups."""
    fewest = fewest_ranks(config)
    if wanted is None:
        return fewest
    if wanted < 1 or wanted % fewest:
        axes = ("shard", "expert", "tensor", "pipeline")
        groups = {f"parallel.{axis}": getattr(config.parallel, axis) for axis in axes}
        groups |= {key: size for size, key in config.all_row_ranks.items()}
        told = ", ".join(f"{key}={size}" for key, size in groups.items() if size > 1) or "no groups"
        raise Refusal(f"--ranks {wanted}: this configuration has {told}; give {fewest} or a multiple of it")
    return wanted


def look_at_data(config: RunConfig, *, is_wanted: bool) -> tuple[int, DocumentsOf, str]:
    """(size of the vocabulary, the documents of a stage's rows, and in words where they are from)."""
    if not is_wanted:
        return vocabulary(config), whole_rows, "attention as if every row were one document"
    try:
        batches = Batches(config.data, seed=config.seed)
    except Refusal as refusal:
        vocabulary(config)
        raise Refusal(f"{refusal}\n(--no-data plans without, as if every row were one document)") from None
    for step in config.stages.first_steps():
        batches.check(demand_of(step, batches))
    documents_of = documents_in(batches, config)
    return batches.tokenizer.vocab_size, documents_of, "attention over documents as in each stage's first rows"


def vocabulary(config: RunConfig) -> int:
    """How many tokens there are; raises Refusal where the tokenizer is not there yet, with another to plan with."""
    try:
        return build_tokenizer(config.data.tokenizer).vocab_size
    except Refusal as refusal:
        raise Refusal(f"{refusal}\n(to plan before it is made: data.tokenizer='{{ kind = \"byte\" }}')") from None


def choose(config: RunConfig, arguments: argparse.Namespace) -> Device:
    """The device that is planned for, in nodes of so many: see `choose_kind`."""
    return in_nodes(choose_kind(config, arguments), arguments.ranks_per_node)


def in_nodes(device: Device, ranks_per_node: int | None) -> Device:
    """The same device, so many on a machine; None: as they are."""
    if ranks_per_node is None:
        return device
    if ranks_per_node < 1:
        raise Refusal(f"--ranks-per-node {ranks_per_node}: give how many ranks share a node, 1 or more")
    return replace(device, links=replace(device.links, ranks_per_node=ranks_per_node))


def choose_kind(config: RunConfig, arguments: argparse.Namespace) -> Device:
    """A device that is named, or the one that is here, measured where no rate is given."""
    if arguments.device is not None:
        device = published(arguments.device)
        device = device if arguments.rate is None else with_rate(device, arguments.rate)
    else:
        here = choose_device(config.device)
        device = this_device(here, choose_dtype(config.precision, here), arguments.rate)
    return device if arguments.efficiency is None else with_efficiency(device, arguments.efficiency)


def what_speeds_mean(config: RunConfig, device: Device) -> list[str]:
    """Lines that belong beside every speed of a plan: what time rests on, what MFU is, routing and padding."""
    peak = f"{short(device.peak)} FLOP/s, {device.source}"
    ceilings = f"{short(device.best.product)} FLOP/s and {device.best.bandwidth / 1e12:.3g} TB/s"
    load = "" if config.model.routed is None else " (even load assumed: the busiest rank holds up the others)"
    return [
        f"Time: {rate_in_words(device)}; without evaluation and data. docs/planning.md says what it rests on.",
        f"MFU: the model's operations, forward and backward, causal, none done twice / seconds / peak ({peak}).",
        f"Floor: {ceilings} ({device.best.source}), links as collectives reach them.",
        f"Routing: {routing_in_words(config.model.routed)}{load}. Padding: 0% of the tokens (rows are packed).",
    ]


def rate_in_words(device: Device) -> str:
    """What time was added up from."""
    if device.shares is not None:
        return f"part by part, of {short(device.peak)} FLOP/s a rank ({device.source}) and links as published"
    return f"{short(device.rate)} FLOP/s a rank, {device.efficiency:.0%} of {short(device.peak)} ({device.source})"
