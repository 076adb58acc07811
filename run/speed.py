"""What a speed is worth: the operations behind a token, the share of the device's peak, and the words beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

from context.step_plan import StepPlan
from data.batch import Batch
from data.distances import real_lengths
from model.size import pairs_seen, step_flops
from model.transformer import ModelSettings

FORMULA = (
    "MFU = tokens/s x model FLOPs a token / (peak FLOP/s of a rank x ranks). Model FLOPs are those of matrix products,"
    " forward and backward: 6 for each weight that a token meets, the head's included, and 6 for each channel of"
    " queries and values of each key that it sees in its own document, causal and within windows. Nothing computed"
    " again counts, no padding, no row that capacity or a null expert left out."
)
"""In one place, as the report and the documents quote it."""


@dataclass(frozen=True)
class StepCounts:
    """What a step's rows hold, of this rank or of all of them."""

    real_tokens: int
    """Tokens that are no padding."""
    pairs: int
    """Of a query and a key that it sees, over all layers; ranks that hold parts of the same rows count all of them."""


def counts_of(microbatches: Sequence[Batch], step: StepPlan, model: ModelSettings) -> StepCounts:
    """From lengths on the host: no device is asked."""
    pairs = sum(pairs_seen(model, real_lengths(batch), step.window) for batch in microbatches)
    return StepCounts(sum(batch.num_real for batch in microbatches), pairs)


def flops_per_token(
    model: ModelSettings, vocab_size: int, num_tokens: int, counts: StepCounts, expert_rows: float | None
) -> float:
    """Model FLOPs of a step over its `num_tokens` places, as `tokens_per_second` counts them: padding adds none.

    counts: over all ranks. expert_rows: see `model.size.step_flops`.
    """
    return step_flops(model, vocab_size, counts.real_tokens, counts.pairs, expert_rows) / num_tokens


def padding_share(num_tokens: int, counts: StepCounts) -> float:
    """Share of the places in a step's rows, before ranks lengthen them to divide, where no token of the data stands.

    A token without a label (-100: the last of its document) is a token all the same.
    """
    return 1 - counts.real_tokens / num_tokens


def utilization(tokens_per_second: float, flops: float | None, peak: float | None, ranks: int) -> float | None:
    """MFU, as FORMULA says it; None where one of its numbers is not known. flops: the model's, a token."""
    if not flops or not peak:
        return None
    return tokens_per_second * flops / (peak * ranks)


def beside(mfu: float | None, routing: str = "", padding: float | None = None) -> str:
    """`MFU 23%, top-2 of 4 learned, padding 3%`: what stands beside a speed, as far as it is known."""
    words = [f"MFU {_percent(mfu)}"] if mfu is not None else []
    words += [routing.replace(",", "")] if routing else []
    words += [f"padding {_percent(padding)}"] if padding is not None else []
    return ", ".join(words)


def _percent(share: float) -> str:
    """`23%`, `4.1%`, `0.02%`, `0%`."""
    value = 100 * share
    return f"{value:.0f}%" if value >= 10 or value == 0 else f"{value:.2g}%"
