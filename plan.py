"""What a run will compute, need and take, before it starts: `python plan.py CONFIG [section.key=value ...]`."""

import argparse
import math
import sys
from dataclasses import replace

from data.batches import Batches
from data.tokenizer import build_tokenizer
from model.size import count
from parallel.mesh import grid_of
from planning.device import Device, published, this_device, with_efficiency, with_rate
from planning.forecast import DocumentsOf, documents_in, forecasts, whole_rows
from planning.outlook import memory_rows, mesh_in_words, size_in_words, stage_rows, table, time_rows
from run.config import RunConfig, load_config
from run.demand import demand_of
from run.metrics import short
from run.plans import tell_plans, whole_documents
from run.start import choose_device, choose_dtype, refusing
from settings import Refusal


def main(arguments: argparse.Namespace) -> None:
    """Print parameters, stages, memory and what ranks would send; raises Refusal where the run would be refused."""
    config = load_config(arguments.config, arguments.overrides)
    num_ranks = choose_ranks(config, arguments.ranks)
    vocab_size, documents_of, looked_at = look_at_data(config, is_wanted=not arguments.no_data)
    device = choose(config, arguments)
    told = list(forecasts(config, vocab_size, num_ranks, device, documents_of))
    print(size_in_words(count(config.model, vocab_size)))
    print(mesh_in_words(grid_of(config.parallel, num_ranks), device.links.ranks_per_node))
    for rows in (stage_rows(told), memory_rows(told, device), time_rows(told)):
        print("", *table(list(rows)), sep="\n")
    print(f"\n{num_ranks} x {device.name}; {looked_at}. FLOP are the model's, forward and backward.")
    print(f"Time: {rate_in_words(device)}; without evaluation and data. docs/planning.md says what it rests on.")
    for line in tell_plans(config.model, config.parallel, config.stages, config.row_ranks, whole_documents):
        print(line)


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
        vocab_size = build_tokenizer(config.data.tokenizer).vocab_size
        return vocab_size, whole_rows, "attention as if every row were one document"
    try:
        batches = Batches(config.data, seed=config.seed)
    except Refusal as refusal:
        raise Refusal(f"{refusal}\n(--no-data plans without, as if every row were one document)") from None
    for step in config.stages.first_steps():
        batches.check(demand_of(step, batches))
    documents_of = documents_in(batches, config)
    return batches.tokenizer.vocab_size, documents_of, "attention over documents as in each stage's first rows"


def rate_in_words(device: Device) -> str:
    """What time was added up from."""
    if device.shares is not None:
        return f"part by part, of {short(device.peak)} FLOP/s a rank ({device.source}) and links as published"
    return f"{short(device.rate)} FLOP/s a rank, {device.efficiency:.0%} of {short(device.peak)} ({device.source})"


def choose(config: RunConfig, arguments: argparse.Namespace) -> Device:
    """The device that is planned for, in nodes of so many: see `choose_kind`."""
    device, ranks = choose_kind(config, arguments), arguments.ranks_per_node
    if ranks is None:
        return device
    if ranks < 1:
        raise Refusal(f"--ranks-per-node {ranks}: give how many ranks share a node, 1 or more")
    return replace(device, links=replace(device.links, ranks_per_node=ranks))


def choose_kind(config: RunConfig, arguments: argparse.Namespace) -> Device:
    """A device that is named, or the one that is here, measured where no rate is given."""
    if arguments.device is not None:
        device = published(arguments.device)
        device = device if arguments.rate is None else with_rate(device, arguments.rate)
    else:
        here = choose_device(config.device)
        device = this_device(here, choose_dtype(config.precision, here), arguments.rate)
    return device if arguments.efficiency is None else with_efficiency(device, arguments.efficiency)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a TOML file, for example configs/quickstart.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values in place of the file's")
    parser.add_argument("--ranks", type=int, help="how many ranks; left out, the fewest that the file's groups need")
    parser.add_argument("--ranks-per-node", type=int, help="how many of them share a machine; left out, 8")
    parser.add_argument("--device", help="one that is not here: a100, h100 or h200")
    parser.add_argument("--rate", type=float, help="FLOP/s that a rank reaches over whole steps, such as 120e12")
    parser.add_argument("--efficiency", type=float, help="share of the device's peak that whole steps reach")
    parser.add_argument("--no-data", action="store_true", help="do not read data: every row counts as one document")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    sys.exit(refusing(lambda: main(arguments)))
