"""Compare arms that differ in one thing: `python compare.py CONFIG [key=value ...]`.

Of runs that exist, ours or others': `python compare.py --runs A B ...`, folders or metrics.jsonl, or LABEL=PATH.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from comparison.arms import ArmsSettings, Entry, expand, matched_lines, read_arms
from comparison.findings import findings
from comparison.launch import check_runs, train_all
from comparison.page import show, write_page
from comparison.results import compare, compare_runs
from run.folder import RUNS
from run.start import refusing
from settings import Refusal, to_toml

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Of a folder in runs/, as a run's own."""
AGAIN = (
    "the same command goes on with these, once what they say is mended; to train one anew move its folder away, to "
    "train all anew give another --name (compare.py has no --fresh)"
)


def main(arguments: argparse.Namespace) -> None:
    """Plan the runs, train those that are not finished, then say what all of them have shown.

    Raises Refusal before any has trained where one of them could not be, and in the end where some have failed.
    """
    if arguments.runs:
        report_runs(arguments)
        return
    settings = read_arms(arguments.config, arguments.overrides, is_small=arguments.small)
    name = arguments.name or arguments.config.stem + ("-small" if arguments.small else "")
    entries = expand(settings, arguments.config, name)
    if not arguments.report:
        check_runs(entries, settings.places)
    for line in matched_lines(entries):
        print(line)
    if arguments.show:
        for line in plan(settings, entries):
            print(line)
        return
    failed = [] if arguments.report else train_all(entries, RUNS / name, settings.places, partial(print, flush=True))
    comparison = compare(settings, entries)
    if settings.isoflop is None:  # arms of many sizes are points of curves: no two of them are to be held apart
        show(comparison)
    found = findings(settings, entries, RUNS / name, print)
    print(f"report: {write_page(comparison, RUNS / name, to_toml(settings), found)}")
    if failed:
        raise Refusal("\n".join([*failed, AGAIN]))


def report_runs(arguments: argparse.Namespace) -> None:
    """The same report of runs that exist. Raises Refusal naming one that cannot be read."""
    comparison = compare_runs(arguments.runs)
    show(comparison)
    print(f"report: {write_page(comparison, arguments.out or RUNS / (arguments.name or 'comparison'), '')}")


def plan(settings: ArmsSettings, entries: Sequence[Entry]) -> Iterator[str]:
    """What would be trained: a line a run, and how much of it all is left."""
    width = max((len(entry.config.name) for entry in entries), default=0)
    for entry in entries:
        stage = entry.config.context.stages[-1]
        begin = 0 if entry.config.branch is None else entry.config.stages[entry.config.branch.stage].start_tokens
        state = "finished" if entry.is_finished else f"{entry.config.total_tokens - begin:,} tokens"
        name = entry.config.name.ljust(width)
        yield f"{name} {state:>18}, ends at length {stage.sequence_length:,} under {stage.rotary.kind}"
    left = sum(not entry.is_finished for entry in entries)
    yield f"{len(entries)} runs, {left} of them to train, {len(settings.places)} at a time"


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    example = "a comparison, for example configs/context/extension_arms.toml"
    parser.add_argument("config", type=Path, nargs="?", help=example)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values in place of the file's: seeds=[0]")
    parser.add_argument("--name", help="what folders below runs/ begin with; left out, the file's name")
    parser.add_argument("--small", action="store_true", help="as the file's table [small] has it")
    parser.add_argument("--show", action="store_true", help="check and list all runs, and train none")
    parser.add_argument("--report", action="store_true", help="train nothing: say what the folders hold so far")
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="report on these: folders, metrics.jsonl, LABEL=PATH")
    parser.add_argument("--out", type=Path, help="with --runs: the report's folder; left out, runs/comparison")
    arguments = parser.parse_intermixed_args(words)
    if bool(arguments.config) == bool(arguments.runs):
        parser.error("give the file of a comparison, or --runs A B ...")
    if arguments.runs:
        given = [f"--{each}" for each in ("small", "show", "report") if getattr(arguments, each)]
        if given:
            parser.error(f"{', '.join(given)}: goes with the file of a comparison; --runs trains nothing, and reports")
        if arguments.name and arguments.out:
            parser.error("--name and --out: both say where the report goes; give one of them")
        if arguments.name and not re.fullmatch(NAME, arguments.name):
            parser.error(
                f"--name {arguments.name!r}: names a folder in runs/: use letters, digits, -, _ and ., or --out"
            )
    if arguments.out and not arguments.runs:
        parser.error("--out: goes with --runs; what a comparison trains is reported in runs/NAME, see --name")
    return arguments


if __name__ == "__main__":
    chosen = parse_arguments()
    sys.exit(refusing(lambda: main(chosen)))
