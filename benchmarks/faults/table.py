"""The outcome of a campaign as a table in Markdown, for the terminal and for the README."""

from collections.abc import Sequence

from benchmarks.faults.bench import Outcome

HEADER = ("fault", "ranks", "times", "ends in", "as promised")


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Numbers of ranks that a fault ends alike on share a line."""
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        fault, _, _, ended, verdict = _cells(outcome)
        groups.setdefault((fault, ended, verdict), []).append(outcome)
    for (fault, ended, verdict), same in groups.items():
        ranks = ", ".join(str(size) for size in sorted({outcome.ranks for outcome in same}))
        lines.append(f"| {fault} | {ranks} | {sum(outcome.tries for outcome in same)} | {ended} | {verdict} |")
    return "\n".join(lines)


def _cells(outcome: Outcome) -> tuple[str, str, str, str, str]:
    verdict = "–" if not outcome.tries else "yes" if outcome.is_good else f"no: {len(outcome.problems)} problems"
    return outcome.fault, str(outcome.ranks), str(outcome.tries), outcome.ended, verdict
