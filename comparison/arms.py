"""Arms: runs that differ in what is compared alone, made of one file and all checked before one of them starts."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, model_validator

from run.branch import different_past
from run.config import RunConfig
from run.folder import RUNS, refuse_other_run
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
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    """What each arm does otherwise than its base: keys of a run's configuration, items of arrays by their number.

    Tables are merged with what is there, unless their kind is another one. Under a key in quotes, as in
    `"context.stages.1.mixture" = { books = 1.0 }`, a table takes the place of the whole one; so in `every` and `base`.
    """
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

    @model_validator(mode="after")
    def _names_are_known(self) -> "ArmsSettings":
        for name in (*self.bases, *self.arms):
            if not re.match(NAME, name):
                raise ValueError(f"{name!r} names a run's folder: use letters, digits, - and _")
        for name in (name for claim in self.claims for name in (*claim.above, *claim.below)):
            if name not in self.arms:
                raise ValueError(f"claims: no arm {name!r}{nearest(name, list(self.arms))}")
        for name in self.only:
            if name not in {**self.bases, **self.arms}:
                raise ValueError(f"only: no base and no arm {name!r}{nearest(name, [*self.bases, *self.arms])}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names one twice; a second run of it would say nothing new")
        return self

    @property
    def chosen_bases(self) -> list[str]:
        return [name for name in self.bases if name in self.only] or list(self.bases)

    @property
    def chosen_arms(self) -> list[str]:
        return [name for name in self.arms if name in self.only] or list(self.arms)


@dataclass(frozen=True)
class Entry:
    """One run of a comparison."""

    config: RunConfig
    base: str
    seed: int
    arm: str | None
    """None: the run that arms branch from."""

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


def with_keys(table: Table, keys: Table, where: str) -> Table:
    """The table with `keys` laid over it; one in quotes is a path, and what stands under it is merged with nothing."""
    for key, value in keys.items():
        path = key.split(".")
        table = put(table, path, value, where) if len(path) > 1 else laid_over(table, {key: value}, where)
    return table


def laid_over(old: Any, new: Any, where: str) -> Any:
    """`old` with the keys of `new`: tables of one kind are merged, items of arrays are reached by number."""
    if isinstance(old, list) and isinstance(new, Mapping):
        _check_numbers(new, old, where)
        return [laid_over(item, new.get(str(n), item), f"{where}.{n}") for n, item in enumerate(old)]
    if isinstance(old, Mapping) and isinstance(new, Mapping) and new.get("kind", old.get("kind")) == old.get("kind"):
        return {**old, **{key: laid_over(old.get(key), value, f"{where}.{key}") for key, value in new.items()}}
    return new


def put(old: Any, path: Sequence[str], new: Any, where: str) -> Any:
    """`old` with `new` at the end of the path, in place of all that was there."""
    if not path:
        return new
    name, *rest = path
    if isinstance(old, list):
        _check_numbers([name], old, where)
        return [put(item, rest, new, f"{where}.{n}") if str(n) == name else item for n, item in enumerate(old)]
    table = old if isinstance(old, Mapping) else {}
    return {**table, name: put(table.get(name), rest, new, f"{where}.{name}")}


def _check_numbers(names: Iterable[str], items: list[Any], where: str) -> None:
    for name in names:
        if name not in map(str, range(len(items))):
            raise Refusal(f"{where}.{name}: is no item of an array of {len(items)}; use a number below {len(items)}")


def expand(settings: ArmsSettings, path: Path, name: str) -> list[Entry]:
    """Every run, each after the one that it branches from. Raises Refusal for the first that cannot be, naming it.

    path: of the file that was read; name: what the names of all runs begin with.
    """
    entries = [
        entry
        for base in settings.chosen_bases
        for seed in settings.seeds
        for entry in _runs(settings, path, base, seed, name)
    ]
    check_branches(entries)
    for entry in entries:
        refuse_other_run(entry.folder, entry.config, WAY_OUT)
    return entries


def _runs(settings: ArmsSettings, path: Path, base: str, seed: int, name: str) -> Iterator[Entry]:
    """The runs of one base and seed."""
    table = with_keys(read_table(path.parent / settings.bases[base]), settings.every, "every") | {"seed": seed}
    shared, stage = f"{name}.{base}.{seed}", settings.branch_stage
    branch: Table = {}
    if stage is not None:
        until = _until_stage(with_keys(table, settings.base, "base"), stage)
        yield Entry(_checked(until, shared), base, seed, None)
        branch = {"branch": {"run": str(RUNS / shared), "stage": stage}}
    for arm in settings.chosen_arms:
        otherwise = with_keys(table, settings.arms[arm], f"arms.{arm}")
        yield Entry(_checked(otherwise | branch, f"{shared}.{arm}"), base, seed, arm)


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
