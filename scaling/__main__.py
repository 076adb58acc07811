"""Fit laws of the loss to finished runs, and ask them what to train: `python -m scaling fit RUNS.csv`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from run.start import refusing
from scaling.fit import DELTA, STARTS, Fit, bootstrap, fit, intervals
from scaling.laws import LAWS, Law
from scaling.picture import draw
from scaling.runs import FLOPS_PER_PARAMETER, Runs, read_csv
from scaling.sets import DEFAULT_SET, SETS, SMALLEST, advise, best_sizes, coefficient_set
from settings import Refusal, nearest


def main(arguments: argparse.Namespace) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number is told as that
        arguments.act(arguments)


def show_fit(arguments: argparse.Namespace) -> None:
    """Coefficients with intervals, how near the runs lie, and the optimum at budgets up to beyond theirs."""
    _check(arguments)
    law = _law(arguments.law)
    runs = read_csv(arguments.runs).without_highest(arguments.drop_highest)
    best = fit(law, runs, delta=arguments.delta, starts=arguments.starts, seed=arguments.seed)
    print(f"{law.name}: {law.formula}\n{law.source}")
    dropped = f" (the {arguments.drop_highest} of highest loss left out)" if arguments.drop_highest else ""
    print(f"{len(runs)} runs{dropped}; Huber loss on log L, delta {best.delta:g}; {arguments.starts} starts")
    print(f"objective {best.objective:.7g} in all; errors: {_errors(best, runs)}")
    thetas_BK = bootstrap(best, runs, rounds=arguments.bootstrap, seed=arguments.seed)
    ranges = intervals(law, thetas_BK) if len(thetas_BK) else {}
    if ranges:
        print(f"95% intervals from {arguments.bootstrap} draws of the runs:")
    for name, value in best.coefficients.items():
        told = "[{:.6g}, {:.6g}]".format(*ranges[name]) if name in ranges else ""
        print(f"  {name:<10} {value:<12.6g} {told}".rstrip())
    troubles = list(_troubles(best))
    for line in troubles or (_optimum(best, runs) if law.has_optimum else ()):
        print(line)
    if arguments.picture:
        draw(best, runs, thetas_BK, arguments.picture)
        print(f"picture: {arguments.picture}")


def _troubles(best: Fit) -> Iterator[str]:
    """Why the coefficients are no law that could be asked for advice."""
    for name, value in best.coefficients.items():
        if not np.isfinite(value):
            yield f"! {name} is {value:g}: these runs do not tell it; add runs, or fit a law with fewer coefficients"
        elif name in ("alpha", "beta", "alpha_N", "alpha_D") and value <= 0:
            yield f"! {name} is not above 0: the loss of these runs does not fall with what it is the power of"


def _optimum(best: Fit, runs: Runs) -> Iterator[str]:
    """A line a budget, for each expansion that was run."""
    lowest, highest = np.log10(runs.flops_R.min()), np.log10(runs.flops_R.max())
    budgets = 10.0 ** np.arange(np.ceil(lowest), np.floor(highest) + 3)
    expansions = [float(expansion) for expansion in np.unique(runs.expansion_R)]
    for expansion in expansions:
        yield f"least loss at 6ND{f', expansion {expansion:g}' if expansions != [1.0] else ''}:"
        for flops, size in zip(budgets, best_sizes(best.law, best.theta_K, budgets, expansion), strict=True):
            tokens = flops / FLOPS_PER_PARAMETER / size
            beyond = "  (beyond the runs)" if flops > runs.flops_R.max() else ""
            told = f"{size:8.3g} parameters, {tokens:8.3g} tokens, {tokens / size:6.1f} a parameter"
            if min(size, tokens) < 1.1 * SMALLEST:
                told = "no best size: the loss falls as far as one can look"
            yield f"  {flops:8.3g} FLOPs: {told}{beyond}"


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what a fit cannot take, before it takes its time."""
    if arguments.bootstrap == 1:
        raise Refusal("--bootstrap 1: one draw has no interval; give 20 or more, or 0 for none")
    for name, least in (("drop_highest", 0), ("bootstrap", 0), ("starts", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise Refusal(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give {least} or more")
    if not 0 < arguments.delta < np.inf:
        raise Refusal(f"--delta {arguments.delta:g}: give a number above 0, such as {DELTA:g}")
    picture = arguments.picture
    if picture is not None and not (picture.suffix == ".png" and picture.parent.is_dir()):
        raise Refusal(f"--picture {picture}: give a .png in a folder that exists")


def show_sets(_: argparse.Namespace) -> None:
    """All named coefficients, and what each says of two budgets."""
    for each in SETS.values():
        ratios = ", ".join(f"{_ratio(each.name, flops):.1f} at {flops:g}" for flops in (1e21, 5.76e23))
        default = " (default)" if each.name == DEFAULT_SET else ""
        print(
            f"{each.name}{default}: A {each.A:g}, B {each.B:g}, E {each.E:g}, alpha {each.alpha:g}, beta {each.beta:g}"
        )
        print(f"  {each.source}\n  tokens a parameter: {ratios}")


def _ratio(name: str, flops: float) -> float:
    advice = advise(flops, coefficient_set(name))
    return advice.tokens / advice.parameters


def _errors(best: Fit, runs: Runs) -> str:
    errors = abs(best.loss(runs) / runs.loss_R - 1)
    return f"half below {sorted(errors)[len(errors) // 2]:.2%}, the largest {max(errors):.2%}"


def _law(name: str) -> Law:
    if name not in LAWS:
        raise Refusal(f"--law={name}: no such law{nearest(name, list(LAWS))}")
    return LAWS[name]


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scaling", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("fit", help="fit a law to the runs of a file")
    one.add_argument("runs", type=Path, help="CSV with parameters, tokens (or FLOPs) and loss of each run")
    one.add_argument("--law", default="chinchilla", help=", ".join(LAWS))
    one.add_argument("--drop-highest", type=int, default=0, metavar="N", help="leave out the runs of highest loss")
    one.add_argument("--bootstrap", type=int, default=200, metavar="N", help="draws for the intervals; 0: none")
    one.add_argument("--starts", type=int, default=STARTS, help="searches, from places of the law's grid")
    one.add_argument("--delta", type=float, default=DELTA, help="of the Huber loss on log L")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--picture", type=Path, metavar="FILE.png", help="draw how near the law lies, and its advice")
    one.set_defaults(act=show_fit)
    two = commands.add_parser("sets", help="named coefficients, and where they are from")
    two.set_defaults(act=show_sets)
    return parser.parse_args(words)


if __name__ == "__main__":
    chosen = parse_arguments()
    sys.exit(refusing(lambda: main(chosen)))
