"""What a run will compute, need and take, before it starts: `python plan.py CONFIG [section.key=value ...]`."""

import argparse
import sys

from model.size import count
from parallel.mesh import grid_of
from planning.asked import asked_of
from planning.budget_words import plan_budget
from planning.forecast import forecasts
from planning.given import choose, choose_ranks, look_at_data, what_speeds_mean
from planning.longest import Ranks, longest_rows
from planning.outlook import memory_rows, mesh_in_words, size_in_words, stage_rows, table, time_rows
from planning.roofline import roofline_rows
from planning.search_words import plan_search
from run.config import load_config
from run.plans import tell_plans, whole_documents
from run.start import refusing
from settings import Refusal


def main(arguments: argparse.Namespace) -> None:
    """Print what was asked for; raises Refusal where the run would be refused."""
    check_flags(arguments)
    if arguments.flops is not None or arguments.hours is not None:
        print(*plan_budget(arguments), sep="\n")
    elif arguments.config is None:
        raise Refusal("give a configuration, such as configs/quickstart.toml, or a budget: --flops 1e21")
    elif arguments.search is not None:
        print(*plan_search(arguments), sep="\n")
    elif arguments.longest:
        longest(arguments)
    else:
        whole_plan(arguments)


def whole_plan(arguments: argparse.Namespace) -> None:
    """Parameters, stages, memory, time part by part, what limits it, and what ranks would send."""
    config = load_config(arguments.config, arguments.overrides)
    num_ranks = choose_ranks(config, arguments.ranks)
    vocab_size, documents_of, looked_at = look_at_data(config, is_wanted=not arguments.no_data)
    device = choose(config, arguments)
    told = list(forecasts(config, vocab_size, num_ranks, device, documents_of))
    asked = asked_of(config, vocab_size, num_ranks, device.numbers)
    print(size_in_words(count(config.model, vocab_size)))
    print(mesh_in_words(grid_of(config.parallel, num_ranks), device.links.ranks_per_node))
    for rows in (stage_rows(told), memory_rows(told, device, asked), time_rows(told), roofline_rows(told, device)):
        print("", *table(list(rows)), sep="\n")
    print(f"\n{num_ranks} x {device.name}; {looked_at}. FLOP are the model's, forward and backward, of what")
    print(
        "each token sees (causal); as if full: with every pair of a query and a key of the longest rows, in all layers."
    )
    print(*what_speeds_mean(config, device), sep="\n")
    for line in tell_plans(config.model, config.parallel, config.stages, config.row_ranks, whole_documents):
        print(line)


def longest(arguments: argparse.Namespace) -> None:
    """The longest rows that fit each stage's ranks, with what is computed again or not."""
    config = load_config(arguments.config, arguments.overrides)
    num_ranks = choose_ranks(config, arguments.ranks)
    vocab_size, _, _ = look_at_data(config, is_wanted=False)
    device = choose(config, arguments)
    print(mesh_in_words(grid_of(config.parallel, num_ranks), device.links.ranks_per_node), "", sep="\n")
    print(*table(list(longest_rows(config, vocab_size, Ranks(num_ranks, device)))), sep="\n")
    print(f"\n{num_ranks} x {device.name}; one row, which is one document, a micro-batch.")
    print(*what_speeds_mean(config, device), sep="\n")


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags of which one would be passed over."""
    is_budget = arguments.flops is not None or arguments.hours is not None
    questions = {"--flops or --hours": is_budget, "--search": arguments.search, "--longest": arguments.longest}
    asked = [flag for flag, is_given in questions.items() if is_given]
    if len(asked) > 1:
        raise Refusal(f"{' and '.join(asked)}: each asks something else; give one of them")
    for name in ("coefficients", "unique_tokens"):
        if getattr(arguments, name) is not None and not is_budget:
            raise Refusal(f"--{name.replace('_', '-')}: belongs to a budget; give --flops or --hours with it")
    if arguments.search is not None and arguments.ranks is not None:
        raise Refusal(f"--ranks {arguments.ranks}: --search says how many ranks; leave one of them out")


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", help="a TOML file, for example configs/quickstart.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values in place of the file's")
    parser.add_argument("--ranks", type=int, help="how many ranks; left out, the fewest that the file's groups need")
    parser.add_argument("--ranks-per-node", type=int, help="how many of them share a machine; left out, 8")
    parser.add_argument("--device", help="one that is not here: a100, h100, h200, or a TOML file that tells of it")
    parser.add_argument("--rate", type=float, help="FLOP/s that a rank reaches over whole steps, such as 120e12")
    parser.add_argument("--efficiency", type=float, help="share of the device's peak that whole steps reach")
    parser.add_argument("--no-data", action="store_true", help="do not read data: every row counts as one document")
    parser.add_argument("--longest", action="store_true", help="the longest rows that fit, of each stage")
    parser.add_argument("--search", metavar="N", help="the fastest mesh of N ranks that fits; 1-N: of the fewest ranks")
    parser.add_argument("--flops", type=float, help="size, tokens, batch and rate for so many FLOPs, 6ND")
    parser.add_argument("--hours", type=float, help="the same for so many hours of --ranks devices")
    parser.add_argument("--coefficients", help="of the scaling law: epoch (left out), hoffmann, hoffmann_rounded")
    parser.add_argument("--unique-tokens", type=float, help="so many there are; more are passes over the same")
    return parser.parse_intermixed_args(given)


if __name__ == "__main__":
    chosen = parse_arguments()
    sys.exit(refusing(lambda: main(chosen)))
