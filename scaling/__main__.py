"""Fit laws of the loss to finished runs, and ask them what to train: `python -m scaling fit RUNS.csv`."""

import argparse
import sys
from pathlib import Path

from run.start import refusing
from scaling.fit import DELTA, STARTS, Fit, bootstrap, fit, intervals
from scaling.laws import LAWS, Law
from scaling.runs import Runs, read_csv
from scaling.sets import DEFAULT_SET, SETS, advise, best_size, coefficient_set
from settings import Refusal, nearest

BUDGETS = (1e18, 1e19, 1e20, 1e21, 1e22, 5.76e23)


def main(arguments: argparse.Namespace) -> None:
    arguments.act(arguments)


def show_fit(arguments: argparse.Namespace) -> None:
    """Coefficients with intervals, how near the runs lie, and the optimum at some budgets."""
    law = _law(arguments.law)
    runs = read_csv(arguments.runs)
    kept = runs.without_highest(arguments.drop_highest)
    best = fit(law, kept, delta=arguments.delta, starts=arguments.starts, seed=arguments.seed)
    print(f"{law.name}: {law.formula}\n{law.source}")
    dropped = f" (the {arguments.drop_highest} of highest loss left out)" if arguments.drop_highest else ""
    print(f"{len(kept)} runs{dropped}; Huber loss on log L, delta {best.delta:g}; {arguments.starts} starts")
    print(f"objective {best.objective:.7g} in all; errors: {_errors(best, kept)}")
    ranges = {}
    if arguments.bootstrap:
        ranges = intervals(law, bootstrap(best, kept, rounds=arguments.bootstrap, seed=arguments.seed))
        print(f"95% intervals from {arguments.bootstrap} draws of the runs:")
    for name, value in best.coefficients.items():
        low, high = ranges.get(name, (None, None))
        print(f"  {name:<10} {value:<12.6g}" + (f" [{low:.6g}, {high:.6g}]" if low is not None else ""))
    if "log D" in law.formula or law.name in ("chinchilla", "kaplan", "joint_moe"):
        print("at 6ND, one expert for all:")
        for flops in BUDGETS:
            size = best_size(best, flops)
            tokens = flops / 6 / size
            print(
                f"  {flops:8.3g} FLOPs: {size:8.3g} parameters, {tokens:8.3g} tokens, {tokens / size:6.1f} a parameter"
            )


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
        raise Refusal(f"--law={name}: no such law{nearest(name, list(LAWS))}; known: {', '.join(LAWS)}")
    return LAWS[name]


def parse_arguments() -> argparse.Namespace:
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
    one.set_defaults(act=show_fit)
    two = commands.add_parser("sets", help="named coefficients, and where they are from")
    two.set_defaults(act=show_sets)
    return parser.parse_args()


if __name__ == "__main__":
    chosen = parse_arguments()
    sys.exit(refusing(lambda: main(chosen)))
