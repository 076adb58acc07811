"""Shared helpers of the model's tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from context.rotary import DefaultRotary
from model.initialize import initialize
from model.transformer import ModelSettings, Transformer, build_model
from settings import validate


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.fixture
def largest_tensor() -> Callable:
    @contextmanager
    def watch() -> Iterator[LargestTensor]:
        with LargestTensor() as largest:
            yield largest

    return watch


VOCAB_SIZE = 61


EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_width": 24}


def tiny_settings(moe: bool | dict = False, **changes: object) -> ModelSettings:
    """Four layers of width 32, dense or MoE; `changes` are keys of ModelSettings as TOML would give them."""
    table: dict[str, object] = {
        "num_layers": 4,
        "width": 32,
        "attention": {"num_heads": 4, "num_kv_heads": 2},
        "feed_forward_width": 48,
    }
    if moe:
        table["moe"] = {**EXPERTS, **(moe if isinstance(moe, dict) else {})}
    return validate({**table, **changes}, ModelSettings, "tiny")


def tiny_model(seed: int = 0, std: float = 0.2, **changes: object) -> Transformer:
    """A tiny model whose weights are large enough that every part of it shows in the output."""
    model = build_model(tiny_settings(initial_std=std, **changes), VOCAB_SIZE)
    initialize(model, seed, "cpu")
    model.use_rotary(DefaultRotary(base=10_000.0))
    return model


@pytest.fixture(name="tiny_settings")
def _tiny_settings() -> Callable[..., ModelSettings]:
    return tiny_settings


@pytest.fixture(name="tiny_model")
def _tiny_model() -> Callable[..., Transformer]:
    return tiny_model


@pytest.fixture(params=["dense", "moe"])
def either_model(request: pytest.FixtureRequest) -> Transformer:
    """The tiny model, once dense and once with experts."""
    return tiny_model(moe=request.param == "moe")
