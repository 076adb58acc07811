"""Every headline measure of every pair of arms, as differences and as sentences."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from comparison.difference import RESAMPLES, Difference, difference
from comparison.measures import headline
from comparison.seen import SeenRun, arms_of, groups_of
from run.metrics import short

ALL_PAIRS = 3
"""Arms up to which each is held against each other; of more, each against the first."""


def differences(runs: Sequence[SeenRun], first: str | None = None, resamples: int = RESAMPLES) -> list[Difference]:
    """Group by group, pair by pair. first: the arm that the others are held against; left out, the first."""
    return [
        found
        for group in groups_of(runs).values()
        for other, arm in pairs_of(list(arms_of(group)), first)
        for found in _of_pair(group, arm, other, resamples)
    ]


def pairs_of(arms: Sequence[str], first: str | None) -> Iterator[tuple[str, str]]:
    """(what is held against, what is held)."""
    ordered = sorted(arms, key=lambda arm: arm != first) if first in arms else list(arms)
    return iter(combinations(ordered, 2) if len(ordered) <= ALL_PAIRS else [(ordered[0], arm) for arm in ordered[1:]])


def _of_pair(group: Sequence[SeenRun], arm: str, other: str, resamples: int) -> Iterator[Difference]:
    runs = [run for run in group if run.arm in (arm, other)]
    for measure, samples in headline(runs):
        sides = [
            [(run.seed, samples[n]) for n, run in enumerate(runs) if run.arm == name and n in samples]
            for name in (arm, other)
        ]
        found = difference(measure, (arm, other), sides[0], sides[1], resamples)
        if found is not None:
            yield replace(found, notes=tuple(_notes(runs, arm, other, found)), group=runs[0].group)


def _notes(runs: Sequence[SeenRun], arm: str, other: str, found: Difference) -> Iterator[str]:
    tokens = {name: {run.tokens for run in runs if run.arm == name and run.tokens is not None} for name in (arm, other)}
    if all(tokens.values()) and len(tokens[arm] | tokens[other]) > 1:
        told = [" or ".join(map(short, sorted(each))) for each in tokens.values()]
        yield f"after {told[0]} and {told[1]} tokens"
    if found.measure.name == "loss" and any(not run.config for run in runs):
        yield "nats a token compare only where tokenizer and text are the same"
    if found.seeds and None not in found.seeds:
        alone = [run.name for run in runs if run.seed not in found.seeds and run.name not in found.lost]
        if alone:
            yield f"without a pair and left out: {', '.join(alone)}"


def summary(found: Iterable[Difference]) -> str:
    """How many comparisons these are, and what chance makes of so many."""
    judged = [each for each in found if each.verdict in ("evidence", "no evidence")]
    if not judged:
        return "No comparison here has two paired seeds, so that none says anything of other seeds."
    shown = sum(each.is_evidence for each in judged)
    return (
        f"{len(judged)} comparisons, {shown} of them with evidence; each alone would find some by chance in one case "
        "of twenty."
    )
