"""One number for what a run has come to: the loss of held-out text where it was asked, else of its last steps."""

import math
import statistics
from dataclasses import dataclass

from comparison.measures import last_loss
from comparison.seen import SeenRun


@dataclass(frozen=True)
class Final:
    """A run's loss at its end."""

    loss: float
    """Nats a token."""
    source: str
    """What it is of, in words."""


def final_loss(run: SeenRun) -> Final | None:
    """None where nothing is known, or what is known is no number.

    Of held-out text the mean over sources, at the longest length that was asked and is not beyond what the run ended
    with: the same text for every run, so that differences between runs are not those of what they read last. Its bits
    per byte become nats a token by the tokens and bytes of the run's own rows.
    """
    bits, per_bit = _held_out(run), _nats_per_bit(run)
    if bits is not None and per_bit is not None:
        return Final(bits[0] * per_bit, f"held-out text at length {bits[1]:,}")
    loss = last_loss(run)
    return None if loss is None or math.isnan(loss) else Final(loss, "the last tenth of training")


def _held_out(run: SeenRun) -> tuple[float, int] | None:
    """(bits per byte, length)."""
    trained = run.metrics[-1].get("sequence_length") if run.metrics else None
    scores: dict[int, list[float]] = {}
    for (task, length, _), row in run.last.items():
        if task.startswith("held_out/") and row["score"] is not None:
            scores.setdefault(length, []).append(row["score"])
    within = [length for length in scores if trained is None or length <= trained] or [min(scores, default=0)]
    return (statistics.fmean(scores[max(within)]), max(within)) if scores else None


def _nats_per_bit(run: SeenRun) -> float | None:
    """Nats a token for a bit a byte."""
    rows = [row for row in run.metrics if row.get("loss") and row.get("bits_per_byte")]
    return statistics.fmean(row["loss"] / row["bits_per_byte"] for row in rows) if rows else None
