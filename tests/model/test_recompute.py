"""Layers that are run again give the numbers of those that are not; what each kind keeps, and what it repeats."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attention.backends.reference import Reference
from model import block
from model.block import BlockMemo, Kind
from model.loss import cross_entropy
from model.transformer import Transformer
from moe.routing import RoutingStats, TokenFacts
from parallel.recompute import KINDS, recompute_layers

VOCAB_SIZE, ROWS, LENGTH = 61, 3, 32
LATENT = {"num_heads": 4, "latent_rank": 12, "nope_channels": 6, "rope_channels": 4, "value_channels": 5}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "windows and sinks": {
        "attention": {"num_heads": 4, "num_kv_heads": 2, "window": 7, "sink": True, "head_norms": True},
        "pattern": ["window", "full_nope"],
    },
    "latent": {"attention": {"kind": "latent", **LATENT}},
    "experts": {"moe": True},
    "a dense layer first": {"moe": True, "num_dense_layers": 1},
    "experts recomputed": {"moe": {"recompute": "up"}},
    "latent, shared experts": {"moe": {"num_shared_experts": 1}, "attention": {"kind": "latent", **LATENT}},
    "shared experts with a gate": {"moe": {"num_shared_experts": 2, "shared_gate": True}},
    "capacity": {"moe": {"capacity": {"factor": 0.75}}},
    "null experts that copy": {"moe": {"null_experts": {"count": 2, "output": "copy"}}},
    "null experts and a capacity": {
        "moe": {"null_experts": {"count": 2, "output": "zero"}, "capacity": {"factor": 1.0}}
    },
    "sigmoid with a bias": {"moe": {"router": {"kind": "sigmoid"}, "balance": [{"kind": "bias"}]}},
    "groups": {"moe": {"router": {"groups": {"count": 2, "keep": 1}}}},
    "jitter": {"moe": {"router": {"jitter": 0.3}}},
    **{
        f"router {kind}": {"moe": {"balance": [], "router": {"kind": kind}}}
        for kind in ("sqrt_softplus", "expert_choice", "random", "hash", "uniform")
    },
}


def tokens() -> Tensor:
    return torch.randint(VOCAB_SIZE, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def facts() -> TokenFacts:
    """With padding at the end of each row."""
    places_BT = torch.arange(LENGTH).expand(ROWS, -1)
    return TokenFacts(tokens()[:, :-1], places_BT, torch.tensor([17, 5, 9]), places_BT < LENGTH - 3)


def losses(model: Transformer) -> tuple[Tensor, tuple[RoutingStats, ...]]:
    """A loss on tokens and on the routing itself, which must reach the router through a second pass too."""
    hidden_BTD, routing = model(tokens()[:, :-1], facts=facts())
    labels_N = tokens()[:, 1:].reshape(-1)
    loss = cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, labels_N, None, chunk=16).weighted
    return loss + sum(stats.logits_NE.square().sum() + stats.gates_NK.sum() for stats in routing), routing


def step(model: Transformer, kinds: Any) -> tuple[Tensor, tuple[RoutingStats, ...], list[Tensor]]:
    recompute_layers(model, kinds)
    model.train()
    model.zero_grad()
    loss, routing = losses(model)
    loss.backward()
    return loss.detach(), routing, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kinds", ["ops", "full", ("none", "ops", "full", "ops")])
@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_and_routing_are_identical(tiny_model: Callable, name: str, kinds: Any) -> None:
    model = tiny_model(**MODELS[name])
    loss, routing, gradients = step(model, "none")
    again, routing_again, gradients_again = step(model, kinds)
    assert torch.equal(loss, again)
    assert len(routing) == len(routing_again) == sum(block.is_moe for block in model.blocks)
    for stats, stats_again in zip(routing, routing_again, strict=True):
        assert torch.equal(stats.chosen_NK, stats_again.chosen_NK)
        assert torch.equal(stats.counts_E, stats_again.counts_E)
    assert len(gradients) == len(gradients_again) == len(list(model.parameters()))
    assert all(torch.equal(grad, other) for grad, other in zip(gradients, gradients_again, strict=True))


@pytest.mark.parametrize("kind", ["ops", "full"])
def test_a_second_choice_is_never_made(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    """Kernels that are not deterministic would choose others: the first choice is used again, and counted once."""
    model, chosen = tiny_model(moe=True), []
    for layer in model.blocks:
        chooser = layer.feed_forward.router.chooser
        choose = chooser.choose

        def watched(*arguments: Any, choose: Callable = choose) -> Tensor:
            chosen.append(choose(*arguments))
            return chosen[-1]

        monkeypatch.setattr(chooser, "choose", watched)
    _, routing, _ = step(model, kind)
    assert len(chosen) == len(routing) == 4
    for first_NK, stats in zip(chosen, routing, strict=True):
        assert torch.equal(first_NK[stats.is_real_N], stats.selected_NK[stats.is_real_N])


class Watched:
    """How often attention went forward, and what blocks remembered."""

    def __init__(self, model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memos: list[BlockMemo] = []
        self.forwards = 0
        watched = self

        class Counted(Reference):
            def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
                watched.forwards += 1
                return super().forward(*arguments)

        def memo(*arguments: Any, **named: Any) -> BlockMemo:
            watched.memos.append(BlockMemo(*arguments, **named))
            return watched.memos[-1]

        monkeypatch.setattr(block, "BlockMemo", memo)
        for layer in model.blocks:
            monkeypatch.setattr(layer.attention.attend, "backend", lambda needs: Counted())


def test_ops_attends_once_and_lets_go_of_the_answers(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept for that dies with the graph."""
    model = tiny_model(moe=True)
    recompute_layers(model, "ops")
    watched = Watched(model, monkeypatch)
    loss, _ = losses(model)
    assert watched.forwards == 4 and len(watched.memos) == 4
    kept = [memo.attention for memo in watched.memos]
    assert all(each is not None and each.answer is not None for each in kept)
    assert all(memo.routing.kept for memo in watched.memos)
    loss.backward()
    assert watched.forwards == 4
    assert all(each is not None and each.answer is None for each in kept)


def test_full_attends_again_and_remembers_the_choice_alone(
    tiny_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(moe=True)
    recompute_layers(model, "full")
    watched = Watched(model, monkeypatch)
    loss, _ = losses(model)
    assert all(memo.attention is None and set(memo.routing.kept) == {"choice"} for memo in watched.memos)
    loss.backward()
    assert watched.forwards == 8


def test_without_gradients_nothing_is_remembered(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(moe=True)
    recompute_layers(model, "ops")
    watched = Watched(model, monkeypatch)
    with torch.no_grad():
        losses(model)
    assert watched.forwards == 4 and not watched.memos


def test_gradients_can_be_asked_for_twice(tiny_model: Callable) -> None:
    """What the first backward pass has let go of is computed again."""
    model = tiny_model(moe=True)
    for kind in KINDS:
        recompute_layers(model, kind)
        loss = model(tokens(), facts=None)[0].square().sum()
        parameters = [p for name, p in model.named_parameters() if name != "head.weight"]
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert all(torch.equal(*pair) for pair in zip(first, torch.autograd.grad(loss, parameters), strict=True))
