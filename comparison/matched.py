"""What a comparison has matched, kept beside its runs: who goes on with them trains the sizes that they began with."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pydantic import Field

from comparison.clock import device_for, time_steps
from comparison.crossed import ArmPlan
from comparison.match import Matched, MatchSettings, Measures, match
from comparison.resize import with_numbers
from comparison.timed import timed_match
from context.stages import StageSettings
from data.tokenizer import TokenizerSettings
from model.transformer import ModelSettings
from run.config import RunConfig
from run.files import read_text, write_whole
from settings import Refusal, Section, differences, to_dict, validate

FILE = "matched.json"


class Side(Section):
    """Of a run, what its size and work rest on."""

    model: ModelSettings
    total_tokens: int
    tokens_per_step: int
    stages: tuple[StageSettings, ...]
    tokenizer: TokenizerSettings

    @classmethod
    def of(cls, config: RunConfig) -> "Side":
        return cls(
            model=config.model,
            total_tokens=config.total_tokens,
            tokens_per_step=config.tokens_per_step,
            stages=config.context.stages,
            tokenizer=config.data.tokenizer,
        )


class Basis(Section):
    """What was to be matched; where it is another, so is the size."""

    match: MatchSettings
    arm: Side
    to: Side


class Found(Section):
    """And what came of it."""

    basis: Basis
    numbers: dict[str, tuple[int, int]]
    """Keys of the model: what they were, and are."""
    measures: Measures
    other: Measures
    notes: tuple[str, ...] = ()

    @property
    def new_numbers(self) -> dict[str, int]:
        return {key: new for key, (_, new) in self.numbers.items()}

    def under(self, basis: Basis) -> "Found":
        """The same where nothing but the tolerance is another one, and this is near enough under it."""
        by = basis.match.by
        off = abs(self.measures.of(by) / self.other.of(by) - 1)
        free = self.basis.model_copy(
            update={"match": self.basis.match.model_copy(update={"tolerance": basis.match.tolerance})}
        )
        is_same = free == basis and off <= basis.match.most_off
        return self.model_copy(update={"basis": basis}) if is_same else self

    def matched(self, config: RunConfig) -> Matched:
        """Of the run as it was, with how it was matched."""
        return Matched(
            config=with_numbers(config, self.new_numbers, config.name),
            to=self.basis.match.to,
            by=self.basis.match.by,
            changed=self.numbers,
            measures=self.measures,
            other=self.other,
            notes=self.notes,
        )


class Kept(Section):
    """The file."""

    arms: dict[str, Found] = Field(default_factory=dict)
    """By `base/arm`."""


@dataclass
class Matching:
    """Matches arms of one comparison, once for each base, or takes what it matched before."""

    settings: MatchSettings
    folder: Path
    threads: int
    """Of a run that is timed and does not say it: as many as it will have."""
    found: dict[str, Found] = field(default_factory=dict)
    """By `base/arm`, so far."""
    kept: Mapping[str, Found] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = read_kept(self.folder).arms

    def match(
        self, base: str, plan: ArmPlan, config: RunConfig, other: RunConfig, has_begun: Callable[[], bool]
    ) -> Found:
        """One arm beside the one that keeps its size; raises Refusal where it began as large as something else.

        has_begun: whether a run of this arm on this base has something to lose.
        """
        key, basis = f"{base}/{plan.name}", Basis(match=self.settings, arm=Side.of(config), to=Side.of(other))
        known = self.found.get(key) or self.kept.get(key)
        known = known and known.under(basis)
        if known is not None and known.basis != basis and has_begun():
            lines = differences(known.basis, basis)
            raise Refusal(
                f"{self.folder / FILE}: {plan.name} on {base} was matched for other settings, and has begun to train:"
                "\n  " + "\n  ".join(lines[:6]) + "\nput these back, or give the comparison another --name"
            )
        if known is None or known.basis != basis:
            known = self._search(plan.arm, config, other, basis)
            if self.settings.by == "seconds":  # timed again, it would have another size: what was shown is what trains
                keep({key: known}, self.folder)
        self.found[key] = known
        return known

    def _search(self, arm: str, config: RunConfig, other: RunConfig, basis: Basis) -> Found:
        device = device_for(other)
        if self.settings.by == "seconds":
            made = timed_match(config, other, self.settings, device, arm, partial(time_steps, threads=self.threads))
            kept = f"kept in {self.folder / FILE}; until training begins, remove it to time anew"
            made = replace(made, notes=(*made.notes, kept))
        else:
            made = match(config, other, self.settings, device, arm)
        return Found(
            basis=basis, numbers=dict(made.changed), measures=made.measures, other=made.other, notes=made.notes
        )


def read_kept(folder: Path) -> Kept:
    """What was matched in a comparison's folder; nothing where there is no file. Raises Refusal where it is damaged."""
    path = folder / FILE
    if not path.is_file():
        return Kept()
    try:
        return validate(json.loads(read_text(path)), Kept, str(path))
    except (ValueError, RecursionError) as error:
        raise Refusal(
            f"{error}\n{path} is damaged or of another version: put a good copy back; where it is gone sizes are "
            "looked for anew, and runs of other sizes refused"
        ) from None


def keep(found: Mapping[str, Found], folder: Path) -> None:
    """Write down what was matched, beside what is there of arms that are left out this time."""
    if found:
        folder.mkdir(parents=True, exist_ok=True)
        kept = Kept(arms={**read_kept(folder).arms, **found})
        write_whole(folder / FILE, f"{json.dumps(to_dict(kept), indent=2)}\n".encode())
