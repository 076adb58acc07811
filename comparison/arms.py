"""Arms: runs that differ in what is compared alone, made of one file and all checked before one of them starts."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, model_validator

from comparison.alike import alike_lines
from comparison.budgets import IsoFlopSettings
from comparison.crossed import ArmPlan, check_own, crossed
from comparison.match import Matched, MatchSettings
from comparison.matched import Found, Matching
from comparison.overlay import laid_over, with_keys
from comparison.resize import with_numbers
from comparison.sweep import SweepSettings
from run.branch import different_past
from run.config import RunConfig
from run.folder import RUNS, has_progress, refuse_other_run
from run.scale import scaled
from settings import Refusal, Section, Table, apply_override, nearest, read_table, validate

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
WAY_OUT = "move that folder away to train the run anew, or give the comparison another --name"
"""Of a folder that is taken, where many runs are."""


class Claim(Section):
    """That some arms score above others; the comparison says how far that is so."""

    above: tuple[str, ...] = Field(min_length=1)
    below: tuple[str, ...] = Field(min_length=1)
    length: PositiveInt
    """Of the samples whose scores are compared, as they are asked: with a `scale`, what it leaves of theirs."""
    task: str = "needle"


class ArmsSettings(Section):
    """What is compared: every arm on every base under every seed."""

    bases: dict[str, str] = Field(min_length=1)
    """A run's configuration file for each, relative to this one."""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What each arm does otherwise than its base: keys of a run's configuration, items of arrays by their number.

    Tables are merged with what is there, unless their kind is another one. Under a key in quotes, as in
    `"context.stages.1.mixture" = { books = 1.0 }`, a table takes the place of the whole one; so in `every` and `base`.
    """
    match: MatchSettings | None = None
    """Left out: arms are as large as they say."""
    sweep: SweepSettings | None = None
    """Arms made of keys and values, crossed with those above."""
    isoflop: IsoFlopSettings | None = None
    """Arms made of sizes at budgets of FLOPs, crossed with those above."""
    only: tuple[str, ...] = ()
    """Of bases and arms, those that run; left out, all."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    branch_stage: PositiveInt | None = None
    """Up to this stage one run for each base and seed trains for all arms, which branch from it there; left out, each
    arm trains from its start."""
    every: dict[str, Any] = Field(default_factory=dict)
    """Keys laid over those of every run."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Keys laid over those of the runs that arms branch from."""
    after_steps: tuple[int, ...] = ()
    """Steps after the branch (0: none, zero-shot) that tables show; left out, all at which something was asked."""
    claims: tuple[Claim, ...] = ()
    jobs: PositiveInt = 1
    """Runs that train at a time, each on its share of the cores."""
    devices: tuple[str, ...] = ()
    """In place of `jobs`: a run at a time on each of these, `cuda:0`, `cuda:1` or `cpu`."""

    @model_validator(mode="after")
    def _seeds_and_names_are_its_own(self) -> "ArmsSettings":
        arms = {f"arms.{arm}": keys for arm, keys in self.arms.items()}
        check_own(self.sweep, {**arms, "every": self.every, "base": self.base})
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> "ArmsSettings":
        for name in (*self.bases, *self.arms):
            if not re.match(NAME, name):
                raise ValueError(f"{name!r} names a run's folder: use letters, digits, - and _")
        if not self.arms and self.sweep is None and self.isoflop is None:
            raise ValueError("arms: names none; add [arms.NAME], or a sweep")
        for name in (name for claim in self.claims for name in (*claim.above, *claim.below)):
            if name not in self.plans:
                raise ValueError(f"claims: no arm {name!r}{nearest(name, list(self.plans))}")
        known = {**self.bases, **self.arms, **self.plans}
        for name in self.only:
            if name not in known:
                raise ValueError(f"only: no base and no arm {name!r}{nearest(name, list(known))}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names one twice; a second run of it would say nothing new")
        return self

    @model_validator(mode="after")
    def _sizes_are_free(self) -> "ArmsSettings":
        """Arms of one size alone can branch, and only one thing can set a size."""
        for key, settings in (("match", self.match), ("isoflop", self.isoflop)):
            if settings is not None and self.branch_stage is not None:
                raise ValueError(
                    f"branch_stage={self.branch_stage}: arms that branch go on with the weights of one run and cannot "
                    f"have sizes of their own; leave branch_stage or {key} out"
                )
        if self.match is not None and self.isoflop is not None:
            raise ValueError("match and isoflop both set sizes; leave one out (curves show arms of any size)")
        if self.match is not None:
            check_match(self.match, list(self.arms))
        return self

    @model_validator(mode="after")
    def _devices_are_known(self) -> "ArmsSettings":
        for device in self.devices:
            if not re.fullmatch(r"cpu|cuda:\d+", device):
                raise ValueError(f"devices: {device!r} is none; write cuda:0, cuda:1, ... or cpu")
        if self.devices and self.jobs != 1:
            raise ValueError(f"jobs={self.jobs} and devices both say how many train at a time; leave jobs out")
        if len(set(self.devices)) < len(self.devices):
            raise ValueError(f"devices={list(self.devices)} names one twice, and a device trains one run at a time")
        return self

    @cached_property
    def plans(self) -> dict[str, ArmPlan]:
        """All arms by name, swept ones among them."""
        return crossed(self.arms, self.sweep, self.isoflop)

    @property
    def chosen_bases(self) -> list[str]:
        return [name for name in self.bases if name in self.only] or list(self.bases)

    @property
    def chosen_arms(self) -> list[str]:
        return [name for name, plan in self.plans.items() if {name, plan.arm} & set(self.only)] or list(self.plans)

    @property
    def places(self) -> tuple[str | None, ...]:
        """Where runs train side by side: devices, or None for whatever a run's configuration says."""
        return self.devices or (None,) * self.jobs


def check_match(match: MatchSettings, arms: Sequence[str]) -> None:
    """Raises ValueError for an arm that is not there."""
    named = {"match.to": (match.to,), "match.arms": match.arms}
    named["match.vary"] = tuple(match.vary) if isinstance(match.vary, dict) else ()
    for key, names in named.items():
        for name in names:
            if name not in arms:
                raise ValueError(f"{key}: no arm {name!r}{nearest(name, list(arms))}")
    if match.to in match.arms:
        raise ValueError(f"match.arms: {match.to!r} is match.to, the one that keeps its size; leave it out")


@dataclass(frozen=True)
class Entry:
    """One run of a comparison."""

    config: RunConfig
    base: str
    seed: int
    arm: str | None
    """None: the run that arms branch from."""
    plan: ArmPlan | None = None
    """What the arm is made of."""
    matched: Matched | None = None
    """How its size was found; None: it has its own."""
    found: Found | None = None
    """The same as it is kept."""
    told: tuple[str, ...] = ()
    """What it shares with the arm that it was matched to."""

    @property
    def folder(self) -> Path:
        return RUNS / self.config.name

    @property
    def is_finished(self) -> bool:
        """Whether the checkpoint of its last step is there; what was asked of it lies in the folder before."""
        last = sum(stage.num_steps for stage in self.config.stages)
        return (self.folder / "checkpoints" / f"step_{last:08d}" / "manifest.json").is_file()


def read_arms(path: Path, overrides: Sequence[str], *, is_small: bool = False) -> ArmsSettings:
    """The comparison a file describes; with `is_small` its table `small` is laid over it. Raises Refusal."""
    table = read_table(path)
    small = table.pop("small", {})
    if is_small:
        if not small:
            raise Refusal(f"{path}: has no table [small] that says what a small comparison is; add one")
        table = laid_over(table, small, f"{path}: small")
    for override in overrides:
        apply_override(table, override)
    return validate(table, ArmsSettings, str(path))


def expand(settings: ArmsSettings, path: Path, name: str) -> list[Entry]:
    """Every run, each after the one that it branches from. Raises Refusal for the first that cannot be, naming it.

    path: of the file that was read; name: what the names of all runs begin with. Where arms are matched by seconds and
    were not before, steps are timed here.
    """
    maker = Maker(settings, path, name)
    entries = [entry for base in settings.chosen_bases for seed in settings.seeds for entry in maker.runs(base, seed)]
    check_branches(entries)
    for entry in entries:
        refuse_other_run(entry.folder, entry.config, WAY_OUT)
    return entries


class Maker:
    """Makes the runs of one comparison."""

    def __init__(self, settings: ArmsSettings, path: Path, name: str) -> None:
        self.settings, self.path, self.name = settings, path, name
        threads = max(1, (os.cpu_count() or 1) // len(settings.places))
        self.matching = Matching(settings.match, RUNS / name, threads) if settings.match else None

    def runs(self, base: str, seed: int) -> Iterator[Entry]:
        """Those of one base and seed."""
        settings, table = self.settings, self.table(base, seed)
        shared, stage = self.shared(base, seed), settings.branch_stage
        branch: Table = {}
        if stage is not None:
            until = _until_stage(with_keys(table, settings.base, "base"), stage)
            yield Entry(_checked(until, shared), base, seed, None)
            branch = {"branch": {"run": str(RUNS / shared), "stage": stage}}
        for plan in (settings.plans[name] for name in settings.chosen_arms):
            entry = Entry(self.config(plan, table, shared, branch), base, seed, plan.name, plan)
            yield self.matched(entry, base) if self.matching else entry

    def table(self, base: str, seed: int) -> Table:
        """What all arms of one base and seed begin with."""
        table = read_table(self.path.parent / self.settings.bases[base])
        return with_keys(table, self.settings.every, "every") | {"seed": seed}

    def shared(self, base: str, seed: int) -> str:
        """What the names of the runs of one base and seed begin with."""
        return f"{self.name}.{base}.{seed}"

    def config(self, plan: ArmPlan, table: Table, shared: str, branch: Table) -> RunConfig:
        """An arm's run before it is matched."""
        otherwise = with_keys(table, plan.keys, f"arms.{plan.arm}")
        otherwise = with_keys(otherwise, dict(plan.cell_keys or {}), f"sweep, {plan.cell}")
        config = _checked(otherwise | branch, f"{shared}.{plan.name}")
        return plan.point.of(config, config.name) if plan.point else config

    def matched(self, entry: Entry, base: str) -> Entry:
        """The run as large as was asked: as its base's first seed has it, so that seeds are of one size."""
        plan, matching = entry.plan, self.matching
        assert plan is not None and matching is not None
        chosen = matching.settings.arms or tuple(self.settings.arms)
        if plan.arm not in chosen or plan.arm == matching.settings.to:
            return entry
        to = self.partner(plan)
        seeds = self.settings.seeds
        first, other = (
            self.config(each, self.table(base, seeds[0]), self.shared(base, seeds[0]), {}) for each in (plan, to)
        )
        own = self.config(to, self.table(base, entry.seed), self.shared(base, entry.seed), {})
        folders = [RUNS / f"{self.shared(base, seed)}.{plan.name}" for seed in seeds]
        found = matching.match(base, plan, first, other, lambda: any(map(has_progress, folders)))
        return replace(
            entry,
            config=with_numbers(entry.config, found.new_numbers, entry.config.name),
            matched=found.matched(first),
            found=found,
            told=tuple(alike_lines(plan.name, entry.config, to.name, own)),
        )

    def partner(self, plan: ArmPlan) -> ArmPlan:
        """The arm that this one is matched to: of the same cell of a sweep, where that one is swept as well."""
        assert self.settings.match is not None
        same = [each for each in self.settings.plans.values() if each.arm == self.settings.match.to]
        return next((each for each in same if each.cell == plan.cell), same[0])


def _checked(table: Table, name: str) -> RunConfig:
    # The numbers of arms are those of their base before its scale, as those of a file that extends another.
    return validate(scaled(table | {"name": name}, name), RunConfig, name)


def _until_stage(table: Table, stage: int) -> Table:
    """The run that ends where the stage would begin."""
    context = table.get("context")
    stages = context.get("stages", []) if isinstance(context, dict) else None
    if not isinstance(stages, list) or not all(isinstance(each, dict) for each in stages):
        raise Refusal("context.stages of the base must be an array of tables; write [[context.stages]] for each")
    if len(stages) <= stage:
        raise Refusal(
            f"branch_stage={stage}: the base has {len(stages)} stages, 0 to {len(stages) - 1}; name a later one"
        )
    kept = stages[:stage]
    return {**table, "context": {**table["context"], "stages": kept}, "total_tokens": kept[-1].get("until_tokens")}


def matched_lines(entries: Sequence[Entry]) -> Iterator[str]:
    """Of each arm on each base, how its size was found, what it was matched by, and what is left unmatched."""
    seen = set()
    for entry in entries:
        if entry.matched is not None and (entry.base, entry.arm) not in seen:
            seen.add((entry.base, entry.arm))
            yield from entry.matched.lines(f"{entry.base}, {entry.arm}")
            yield from (f"  {line}" for line in entry.told)


def check_branches(entries: Sequence[Entry]) -> None:
    """Refuse an arm that would have been another run before it branches."""
    bases = {(entry.base, entry.seed): entry for entry in entries if entry.arm is None}
    for entry in entries:
        origin, branch = bases.get((entry.base, entry.seed)), entry.config.branch
        if entry.arm is not None and origin is not None and branch is not None:
            lines = different_past(origin.config, entry.config, branch.stage)
            if lines:
                raise Refusal(
                    f"arms.{entry.arm}: changes what its base does before stage {branch.stage}, where it branches: "
                    f"{'; '.join(lines[:3])}; change that in `every`, or leave branch_stage out"
                )
