"""What of others' metrics cannot be what its key says, and is left out with a note that says so."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from run.metrics import Row

LEAST: dict[str, float] = {
    "mfu": 0.0,
    "tokens_per_second": 1e-6,
    "elapsed_seconds": 0.0,
    "peak_memory_bytes": 0.0,
    "flops_per_token": 0.0,
    "padding_share": 0.0,
}
MOST: dict[str, float] = {"mfu": 1.0, "padding_share": 1.0}
GROWING = {
    "tokens": "they are no count of all tokens until then, such as those of each step; left out of what is drawn "
    "against tokens",
    "elapsed_seconds": "it is no time since the start, such as that of each step; left out",
}
"""Keys that count from the start of a run, and what is said where they do not."""


def plausible(rows: Sequence[Row], called: Callable[[str], str]) -> tuple[list[Row], list[str]]:
    """The rows, in the order of their steps, without what cannot be, and a note on each key that lost something.

    called: what a key of ours is called in the file.
    """
    kept, notes = [dict(row) for row in rows], []
    if any(row.get("mfu", 0) > 1 for row in kept):
        notes.append(f"{called('mfu')}: taken as percent, as some of it is above 1")
        for row in kept:
            row |= {"mfu": row["mfu"] / 100} if "mfu" in row else {}
    for key, why in GROWING.items():
        if odd := _not_growing(kept, key):
            notes.append(f"{called(key)}: {odd}, so {why}")
            for row in kept:
                row.pop(key, None)
    notes += _within(kept, called)
    return kept, notes


def _within(rows: Sequence[Row], called: Callable[[str], str]) -> Iterator[str]:
    """Takes out values beyond LEAST and MOST; a note a key."""
    for key, least in LEAST.items():
        wrong = [row for row in rows if key in row and not least <= row[key] <= MOST.get(key, float("inf"))]
        if wrong:
            first = wrong[0]
            told = f"{called(key)}: left out on {len(wrong)} row{'s' if len(wrong) > 1 else ''} where it cannot be"
            yield f"{told} (step {first['step']}: {first[key]:g})"
        for row in wrong:
            del row[key]


def _not_growing(rows: Sequence[Row], key: str) -> str:
    """What stands against a count from the start; nothing where it is one."""
    known = [(row["step"], row[key]) for row in rows if key in row]
    if known and min(value for _, value in known) < 0:
        return "is below 0"
    for (step, before), (later, after) in pairwise(known):
        if after < before:
            return f"falls from {before:,} at step {step} to {after:,} at step {later}"
    if len(known) > 1 and known[0][1] == known[-1][1]:
        return f"does not grow, being {known[0][1]:,} on all {len(known)} rows"
    return ""
