"""Recomputation: what each layer keeps for the backward pass, and what it runs again instead."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator
from torch import nn

from model.block import Block, Kind
from settings import Section, nearest

KINDS: tuple[Kind, ...] = get_args(Kind)
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
WAYS = '"none", "ops", "full" or { budget = "20 GB" }'


class BudgetSettings(Section):
    """Of each layer as much is run again as a rank's memory needs, and no more."""

    budget: str
    """The most that a rank may need in all, as "20 GB" or "18.5 GiB"."""

    @property
    def bytes(self) -> int:
        return size_in_bytes(self.budget)


def size_in_bytes(text: str) -> int:
    """`20 GB` is 20e9, `20 GiB` 20 * 2**30; raises ValueError where it is neither."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMGT]i?)?)B\s*", text)
    if found is None or float(found[1]) == 0:
        raise ValueError(f'budget={text!r} is no size in bytes; write it as "20 GB" or "18.5 GiB"')
    return int(float(found[1]) * UNITS[found[2]])


def _meant(value: Any) -> Any:
    """A kind, or a budget; `true` and `false` as they were written once."""
    if isinstance(value, bool):
        return "ops" if value else "none"
    if isinstance(value, str):
        if value not in KINDS:
            raise ValueError(f"unknown kind{nearest(value, KINDS)}; write {WAYS}")
        return value
    if isinstance(value, BudgetSettings):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"write {WAYS}")
    for key in value:
        if key != "budget":
            raise ValueError(f"{key} is no key of it; write {WAYS}")
    size_in_bytes(str(value.get("budget", "")))
    return BudgetSettings(budget=value["budget"])


RecomputeSettings = Annotated[Kind | BudgetSettings, BeforeValidator(_meant)]
"""One kind for all layers, or a budget by which each layer has its own."""

Kinds = Kind | Sequence[Kind]
"""Of all layers alike, or of each."""


def recompute_layers(model: nn.Module, kinds: Kinds) -> None:
    """Let every layer that is here keep as much as its kind says."""
    for name, block in model.named_modules():
        if isinstance(block, Block):
            block.recompute = kind_of(kinds, int(name.rpartition(".")[2]))


def kind_of(kinds: Kinds, layer: int) -> Kind:
    """Of one layer."""
    return kinds if isinstance(kinds, str) else kinds[layer]


def in_words(kinds: Sequence[Kind]) -> str:
    """`layers 0-7 full, 8-23 ops`."""
    runs, first = [], 0
    for kind, group in groupby(kinds):
        last = first + len(list(group)) - 1
        runs.append(f"{first}-{last} {kind}" if last > first else f"{first} {kind}")
        first = last + 1
    return f"layers {', '.join(runs)}"
