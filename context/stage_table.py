"""The plan of a run as a table in words, for the terminal and the report."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from context.growth import Growth, WindowGrowth
from context.rotary import RotaryMap
from settings import Section

if TYPE_CHECKING:
    from context.stages import Stage


def table_of(stages: Sequence["Stage"]) -> list[dict[str, str]]:
    """One row a stage, column title to text. A column of RARE is there where some stage has something to say in it."""
    told = {title for title, tell in RARE.items() for stage in stages if tell(stage)}
    columns = {**ALWAYS, **{title: tell for title, tell in RARE.items() if title in told}}
    return [{title: tell(stage) or "-" for title, tell in columns.items()} for stage in stages]


def in_words(section: Section) -> str:
    """`yarn base=10000 factor=4`: the kind and what was set."""
    if isinstance(section, RotaryMap):
        return f"full layers {in_words(section.full)}, window layers {in_words(section.window)}"
    fields = section.model_dump(exclude_none=True, exclude_defaults=True)
    told = [f"{name}={_number(value)}" for name, value in fields.items() if isinstance(value, int | float)]
    told += [f"{name}={value}" for name, value in fields.items() if isinstance(value, str) and name != "kind"]
    return " ".join([kind, *told] if (kind := getattr(section, "kind", "")) else told)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:g}" for name, share in shares.items())


def _mixture(stage: "Stage") -> str:
    unit = "" if stage.settings.mixture_unit == "tokens" else f" of {stage.settings.mixture_unit}"
    return _shares(stage.mixture) + unit if stage.mixture else "as the sources say"


def _buckets(stage: "Stage") -> str:
    return "; ".join(
        f"{name} " + ", ".join(f"{bucket.share:g} of {bucket.from_tokens:,} tokens or more" for bucket in buckets)
        for name, buckets in stage.settings.buckets.items()
    )


def _growth(stage: "Stage") -> str:
    growth: Growth | None = stage.settings.growth
    if growth is None:
        return ""
    if isinstance(growth, WindowGrowth):
        last = stage.step(stage.num_steps - 1).window
        return f"window {growth.start:,} to {f'{last:,}' if last else 'all'}"
    lengths = ", ".join(f"{length:,}" for length in stage.lengths.distinct.tolist())
    return f"{growth.kind} over {lengths}"


ALWAYS: dict[str, Callable[["Stage"], str]] = {
    "stage": lambda stage: str(stage.index),
    "tokens": lambda stage: f"{stage.start_tokens:,} to {stage.until_tokens:,}",
    "steps": lambda stage: f"{stage.num_steps:,}",
    "tokens a step": lambda stage: f"{stage.tokens_per_step:,}",
    "sequence length": lambda stage: f"{stage.sequence_length:,}",
    "samples a step": lambda stage: f"{stage.tokens_per_step // stage.sequence_length:,}",
    "rotary": lambda stage: in_words(stage.rotary),
    "learning rate": lambda stage: in_words(stage.settings.learning_rate),
    "mixture": _mixture,
}

RARE: dict[str, Callable[["Stage"], str]] = {
    "growth": _growth,
    "moments": lambda stage: "reset" if stage.settings.moments == "reset" else "",
    "buckets": _buckets,
    "packing": lambda stage: stage.settings.pack or "",
    "document mask": lambda stage: "" if stage.settings.has_document_mask else "none",
    "positions": lambda stage: in_words(positions) if (positions := stage.settings.positions).kind == "pose" else "",
    "ranks a row": lambda stage: str(stage.settings.context or ""),
    "gate": lambda stage: in_words(gate) if (gate := stage.settings.gate) is not None else "",
}
