"""A run's model made larger or smaller by one number, and what goes with it in proportion."""

import math
import tomllib
from collections.abc import Mapping
from typing import Any, Literal

from run.config import RunConfig
from settings import Refusal, Table, to_toml, validate

Vary = Literal["inner", "width", "depth", "experts"]
"""The width inside experts and dense feed-forward layers; the model's width, with what is inside in proportion; its
layers; how many experts there are."""
LARGEST: Mapping[Vary, int] = {"inner": 1 << 17, "width": 1 << 15, "depth": 512, "experts": 4096}


def unit_of(config: RunConfig, vary: Vary, multiple_of: int) -> int:
    """What the number has to be a multiple of, for kernels and for heads, experts and ranks to come out even."""
    if vary == "experts":
        return config.parallel.expert
    if vary == "depth":
        return 1
    heads = getattr(config.model.attention, "num_heads", 1)
    has_own_channels = getattr(config.model.attention, "channels", 1) is not None
    # Channels of a head are rotated two by two.
    return multiple_of if vary == "inner" or has_own_channels else math.lcm(multiple_of, 2 * heads)


def least(config: RunConfig, vary: Vary, unit: int) -> int:
    """The smallest that can be, in units."""
    moe = config.model.moe
    if vary == "experts":
        if moe is None or config.model.num_dense_layers == config.model.num_layers:
            raise Refusal("match.vary='experts': this arm has no experts; vary 'inner', 'width' or 'depth'")
        return -(-moe.experts_per_token // unit)
    is_dense = config.model.num_dense_layers == config.model.num_layers
    return max(0 if is_dense else config.model.num_dense_layers, 1) if vary == "depth" else 1


def numbers_of(config: RunConfig) -> dict[str, int]:
    """The keys that may be moved."""
    model, found = config.model, {"model.width": config.model.width, "model.num_layers": config.model.num_layers}
    if model.num_dense_layers:
        found["model.num_dense_layers"] = model.num_dense_layers
    if model.feed_forward_width is not None:
        found["model.feed_forward_width"] = model.feed_forward_width
    if model.moe is not None:
        found |= {"model.moe.expert_width": model.moe.expert_width, "model.moe.num_experts": model.moe.num_experts}
    return found


def with_numbers(config: RunConfig, numbers: Mapping[str, int], where: str) -> RunConfig:
    """The run with such keys of its model set; raises Refusal, by that name, for what cannot be."""
    table: Table = tomllib.loads(to_toml(config))
    for key, value in numbers.items():
        *path, last = key.split(".")
        place: Any = table
        for name in path:
            place = place[name]
        place[last] = value
    return validate(table, RunConfig, where)


def resized(config: RunConfig, vary: Vary, value: int, where: str) -> RunConfig:
    """The run with one number of its model set; of `inner` and `width`, those that go with it in proportion."""
    model = config.model
    numbers: dict[str, int] = {}
    if vary == "depth":
        numbers["model.num_layers"] = value
        if model.num_dense_layers and model.num_dense_layers == model.num_layers:
            numbers["model.num_dense_layers"] = value
    elif vary == "experts":
        numbers["model.moe.num_experts"] = value
    else:
        scale = value / (model.width if vary == "width" else inner_of(config))
        if vary == "width":
            numbers["model.width"] = value
        kinds = {model.feed_forward_kind(layer) for layer in range(model.num_layers)}
        if model.feed_forward_width is not None and "dense" in kinds:
            numbers["model.feed_forward_width"] = max(1, round(model.feed_forward_width * scale))
        if model.moe is not None and kinds != {"dense"}:
            numbers["model.moe.expert_width"] = max(1, round(model.moe.expert_width * scale))
    return with_numbers(config, numbers, where)


def inner_of(config: RunConfig) -> int:
    """The width inside the layers that most have: of an expert, or of a dense layer where no layer has experts."""
    model = config.model
    if model.moe is None or model.num_dense_layers == model.num_layers:
        assert model.feed_forward_width is not None, "a dense model has one"
        return model.feed_forward_width
    return model.moe.expert_width


def number_of(config: RunConfig, vary: Vary) -> int:
    """The number that is moved."""
    model = config.model
    if vary == "inner":
        return inner_of(config)
    if vary == "experts":
        assert model.moe is not None
        return model.moe.num_experts
    return model.width if vary == "width" else model.num_layers
