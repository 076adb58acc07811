"""First values: their table, their independence of everything but seed and name."""

import math

import pytest
import torch

from context.rotary import DefaultRotary
from model.initialize import first_values, initialize
from model.loss import cross_entropy
from model.transformer import Transformer, build_model

VOCAB_SIZE = 61


def test_values_depend_on_seed_and_name_alone(tiny_settings) -> None:
    settings = tiny_settings(moe=True)
    once, partly_dense = (
        build_model(settings, VOCAB_SIZE),
        build_model(tiny_settings(moe=True, num_dense_layers=1), VOCAB_SIZE),
    )
    built_on_cpu = Transformer(settings, VOCAB_SIZE)
    for model in (partly_dense, built_on_cpu, once):
        initialize(model, 3, "cpu")
    values, others = once.state_dict(), partly_dense.state_dict()
    assert all(torch.equal(value, built_on_cpu.state_dict()[name]) for name, value in values.items())
    shared = [name for name in values if name in others]
    assert len(shared) > len(values) / 2
    assert all(torch.equal(values[name], others[name]) for name in shared)


def test_another_seed_or_name_gives_other_values(tiny_settings) -> None:
    settings, shape = tiny_settings(), torch.Size((64, 64))
    names = ["embedding.weight", "head.weight", "blocks.0.attention.query.weight", "blocks.1.attention.query.weight"]
    drawn = [first_values(name, shape, settings, seed) for name in names for seed in (0, 1)]
    correlations = torch.corrcoef(torch.stack([values.flatten() for values in drawn]))
    assert (correlations - torch.eye(len(drawn))).abs().max() < 0.1


def test_the_table_gives_each_kind_its_scale(tiny_settings) -> None:
    settings = tiny_settings(
        moe=True,
        width=128,
        num_dense_layers=1,
        initial_std=0.05,
        attention={"num_heads": 4, "num_kv_heads": 2, "head_norms": True},
    )
    model = build_model(settings, VOCAB_SIZE)
    initialize(model, 0, "cpu")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.eq(1).all(), name
            continue
        is_residual = ".output." in name or ".down" in name
        expected = 0.05 / math.sqrt(2 * 4) if is_residual else 0.05
        assert parameter.std().item() == pytest.approx(expected, rel=0.15), name
    residual = [name for name, _ in model.named_parameters() if ".output." in name or ".down" in name]
    assert len(residual) == 8


def test_every_tensor_is_given_values(tiny_settings) -> None:
    moe = {"num_experts": 4, "experts_per_token": 2, "expert_width": 24, "num_shared_experts": 1}
    model = build_model(
        tiny_settings(moe={**moe, "router": {"kind": "sigmoid"}, "balance": {"kind": "bias"}}), VOCAB_SIZE
    )
    initialize(model, 0, "cpu")
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(tensor.device.type == "cpu" and tensor.isfinite().all() for tensor in tensors.values())
    biases = [tensor for name, tensor in model.named_buffers() if "bias" in name]
    assert len(biases) == 4
    assert all(bias.eq(0).all() for bias in biases)


@pytest.mark.parametrize("moe", [False, True])
def test_an_untrained_model_knows_nothing(tiny_settings, moe: bool) -> None:
    vocab_size = 512
    model = build_model(tiny_settings(moe=moe), vocab_size)
    initialize(model, 0, "cpu")
    model.use_rotary(DefaultRotary(base=10_000.0))
    tokens = torch.randint(vocab_size, (4, 129), generator=torch.Generator().manual_seed(1))
    hidden, _ = model(tokens[:, :-1])
    sums = cross_entropy(hidden.flatten(0, 1), model.head_weight, tokens[:, 1:].reshape(-1), None, chunk=100)
    assert (sums.plain / sums.targets).item() == pytest.approx(math.log(vocab_size), abs=0.05)


def test_an_unknown_parameter_is_not_left_to_chance(tiny_settings) -> None:
    with pytest.raises(AssertionError, match=r"names blocks\.0\.surprise"):
        first_values("blocks.0.surprise", torch.Size((2, 2)), tiny_settings(), 0)
