"""What a suite costs against training, counted in floating-point operations, and how often it may then be asked."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from evals.copying import CopyingSettings
from evals.held_out import HeldOutSettings
from evals.induction import InductionSettings
from evals.k_shot_copy import KShotCopySettings
from evals.last_tokens import LastTokensSettings
from evals.long_ppl import LongPplSettings, num_short
from evals.many_needles import ManyNeedlesSettings
from evals.mqar import PUBLISHED_VOCABULARY, MqarSettings, asked
from evals.needle import NeedleSettings
from evals.passkey import PasskeySettings
from evals.positions import PositionsSettings
from evals.routing import RoutingSettings
from evals.routing_positions import RoutingPositionsSettings
from evals.ruler.asking import RulerSettings
from evals.ruler.tasks import RULER_TASKS
from evals.suite import EvalsSettings, tasks_of
from model.size import flops_per_token
from model.transformer import ModelSettings
from settings import Refusal, Section

Reading = tuple[int, float]
"""(tokens of a row, tokens of all rows of that length together)."""
QUESTION = 16
"""Tokens, at most, that follow what the questions of one haystack have in common."""


def needle(settings: NeedleSettings) -> Iterable[Reading]:
    for length in settings.lengths:
        once, more = len(settings.depths), 0
        if settings.one_haystack:
            once, more = 1, len(settings.depths) * QUESTION
        yield length, settings.samples * (once * length + more)


def held_out(settings: HeldOutSettings) -> Iterable[Reading]:
    return ((length, max(length, settings.tokens)) for length in settings.lengths)


def many_needles(settings: ManyNeedlesSettings) -> Iterable[Reading]:
    # The questions of multi_query and multi_value differ in all but their haystack; none is counted as shared.
    return ((length, len(settings.forms) * settings.samples * length) for length in settings.lengths)


def passkey(settings: PasskeySettings) -> Iterable[Reading]:
    # What the model writes comes on top: few tokens, each behind a prompt that is read.
    times = len(settings.depths) * settings.samples * (2 if settings.generate else 1)
    return ((length, times * length) for length in settings.lengths)


def ruler(settings: RulerSettings) -> Iterable[Reading]:
    # Fewer where a text is not given or a length has no room; a length counts what the model writes.
    times = len(settings.tasks or RULER_TASKS) * settings.samples * (2 if settings.generate else 1)
    return ((length, times * length) for length in settings.lengths)


def windows(settings: PositionsSettings | RoutingSettings | RoutingPositionsSettings) -> Iterable[Reading]:
    yield settings.length, max(settings.length, settings.tokens)


def last_tokens(settings: LastTokensSettings) -> Iterable[Reading]:
    tokens = max(settings.length, settings.tokens)
    return ((math.ceil(share * settings.length), math.ceil(share * tokens)) for share in settings.shares)


def long_ppl(settings: LongPplSettings) -> Iterable[Reading]:
    tokens, short = max(settings.length, settings.tokens), num_short(settings)
    stride = settings.stride or max(1, short // 4)
    yield settings.length, tokens
    truncated = math.ceil((settings.length - short + 1) / stride)
    yield short + stride, tokens / settings.length * truncated * (short + stride)


def mqar(settings: MqarSettings) -> Iterable[Reading]:
    return ((length, float(settings.samples * length)) for length, _ in asked(settings, PUBLISHED_VOCABULARY))


def induction(settings: InductionSettings) -> Iterable[Reading]:
    return ((length, settings.samples * length) for length in settings.lengths)


def copying(settings: CopyingSettings) -> Iterable[Reading]:
    return ((2 * lag, settings.samples * 2 * lag) for lag in settings.lags)


def k_shot_copy(settings: KShotCopySettings) -> Iterable[Reading]:
    rows = ((shots + 1) * 2 * (settings.block + 1) for shots in settings.shots)
    return ((row, settings.samples * row) for row in rows)


READINGS: Mapping[str, Callable[[Any], Iterable[Reading]]] = {
    "held_out": held_out,
    "needle": needle,
    "many_needles": many_needles,
    "passkey": passkey,
    "ruler": ruler,
    "positions": windows,
    "last_tokens": last_tokens,
    "long_ppl": long_ppl,
    "mqar": mqar,
    "induction": induction,
    "copying": copying,
    "k_shot_copy": k_shot_copy,
    "routing": windows,
    "routing_positions": windows,
}
"""What each task reads; where it reads sources, of each of them."""


def task_flops(settings: Section, name: str, num_sources: int, model: ModelSettings, vocab_size: int) -> float:
    """Operations of asking one task, at most: a forward pass is a third of a training step on the same tokens.

    Logits are counted at every token, though they are made where something is asked alone.
    """
    if name not in READINGS:
        raise Refusal(f"evals.share cannot count what {name!r} reads; give evals.every_tokens in its place")
    sources = len(getattr(settings, "sources", ())) or num_sources
    times = sources if hasattr(settings, "sources") else 1
    return times * sum(
        tokens * flops_per_token(model, vocab_size, length) / 3 for length, tokens in READINGS[name](settings)
    )


def suite_flops(settings: EvalsSettings, num_sources: int, model: ModelSettings, vocab_size: int) -> float:
    """Operations of asking everything once, at most."""
    asked = {name: getattr(settings, name) for name in tasks_of(settings)}
    return sum(task_flops(table, name, num_sources, model, vocab_size) for name, table in asked.items())


def with_interval(
    settings: EvalsSettings, num_sources: int, model: ModelSettings, vocab_size: int, sequence_lengths: Iterable[int]
) -> EvalsSettings:
    """The settings with `every_tokens` in the place of `share`: so many training tokens that the suite costs at most
    that share of them, at whichever of the sequence lengths a token costs least."""
    if settings.share is None:
        return settings
    cheapest = min(flops_per_token(model, vocab_size, length) for length in sequence_lengths)
    every = math.ceil(suite_flops(settings, num_sources, model, vocab_size) / (settings.share * cheapest))
    return settings.model_copy(update={"share": None, "every_tokens": max(1, every)})
