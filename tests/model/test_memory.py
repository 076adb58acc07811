"""What is said to be needed is what is there: tensors alive on a CPU, weights and moments of a built model."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from attention.mask import Documents, Mask
from context.rotary import DefaultRotary
from model.block import Kind
from model.initialize import initialize
from model.kept import SCORES, Numbers
from model.loss import cross_entropy
from model.memory import Memory, _loss, memory, parts, states
from model.passing import EXCHANGE
from model.share import Share
from model.transformer import ModelSettings, Transformer, build_model
from optim.groups import AdamWSettings, MuonSettings, build_optimizer
from parallel.recompute import KINDS, recompute_layers
from settings import validate
from tests.model.alive import Alive

VOCAB_SIZE, ROWS, LENGTH = 257, 4, 96
N = ROWS * LENGTH
FP32 = Numbers(4, "cpu")
BF16 = Numbers(2, "cpu")
GROUPED = {"kind": "grouped", "num_heads": 4, "num_kv_heads": 2, "head_norms": True}
LATENT = {
    "kind": "latent",
    "num_heads": 4,
    "latent_rank": 20,
    "nope_channels": 10,
    "rope_channels": 6,
    "value_channels": 7,
}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_width": 40}
SIGMOID = {"kind": "sigmoid", "scale": 2.0}
BASE = {"num_layers": 2, "width": 32, "attention": GROUPED, "feed_forward_width": 96}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "plain heads": {"attention": {**GROUPED, "head_norms": False, "num_kv_heads": 4}},
    "wide heads": {"attention": {**GROUPED, "channels": 24}},
    "window": {"attention": {**GROUPED, "window": 20}, "pattern": ["window", "full_nope"]},
    "latent": {"attention": LATENT},
    "latent with wide values": {"attention": {**LATENT, "value_channels": 30}},
    "latent with small queries": {"attention": {**LATENT, "query_rank": 9}},
    "experts": {"moe": EXPERTS},
    "experts after a dense layer": {"moe": EXPERTS, "num_dense_layers": 1, "num_layers": 3},
    "a wide layer below narrow ones": {
        "moe": EXPERTS,
        "num_dense_layers": 1,
        "num_layers": 5,
        "feed_forward_width": 600,
    },
    "experts recomputed": {"moe": {**EXPERTS, "recompute": "up"}},
    "one expert": {"moe": {**EXPERTS, "experts_per_token": 1, "router": {"normalize": False}}},
    "sigmoid": {"moe": {**EXPERTS, "router": SIGMOID}},
    "shared experts": {"moe": {**EXPERTS, "num_shared_experts": 2}},
    "shared experts with a gate": {"moe": {**EXPERTS, "num_shared_experts": 1, "shared_gate": True}},
    **{f"router {kind}": {"moe": {**EXPERTS, "router": {"kind": kind}}} for kind in SCORES if kind != "expert_choice"},
}
"""Models of which every byte is known."""
DROPPING: dict[str, dict[str, Any]] = {
    "capacity": {"moe": {**EXPERTS, "capacity": {"factor": 1.0}}},
    "null experts": {"moe": {**EXPERTS, "null_experts": {"count": 2, "output": "copy"}}},
    "expert choice": {"moe": {**EXPERTS, "balance": [], "router": {"kind": "expert_choice"}}},
}
"""Models of which some slots go nowhere: how many depends on what they have learned."""


def settings_of(name: str) -> ModelSettings:
    return validate({**BASE, **{**MODELS, **DROPPING}[name]}, ModelSettings, name)


def built(settings: ModelSettings) -> Transformer:
    model = build_model(settings, VOCAB_SIZE)
    initialize(model, 0, "cpu")
    model.use_rotary(DefaultRotary(base=1e4))
    return model


class Step:
    """What a micro-batch after the first one allocates: gradients are there, and masks have been drawn."""

    def __init__(self, settings: ModelSettings, share: Share) -> None:
        self.model, self.share = built(settings), share
        recompute_layers(self.model, share.recompute)
        self.tokens_BT = torch.arange(N).view(ROWS, LENGTH) * 7 % VOCAB_SIZE
        self.positions_BT, self.labels_N = torch.arange(LENGTH).expand(ROWS, LENGTH), self.tokens_BT.flatten()
        self.mask = Mask(documents=Documents((LENGTH,) * ROWS))
        with torch.no_grad():
            self.forward()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def first_tokens(self, number: int) -> None:
        """A single row of so many tokens from here on."""
        self.tokens_BT, self.labels_N = self.tokens_BT[:1, :number], self.labels_N[:number]
        self.positions_BT, self.mask = self.positions_BT[:1, :number], Mask(documents=Documents((number,)))

    def forward(self) -> tuple[torch.Tensor, Any]:
        with self.precision():
            return self.model(self.tokens_BT, self.positions_BT, self.mask)

    def precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.share.numbers.is_cast)

    def alive(self) -> Alive:
        weights = [*self.model.parameters(), *self.model.buffers()]
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return Alive([*weights, *gradients, self.tokens_BT, self.positions_BT, self.labels_N])

    def kept(self) -> int:
        """Bytes alive between forward and backward."""
        with self.alive() as alive:
            answer = self.forward()
        assert answer
        return alive.bytes

    def peak(self) -> int:
        """The most bytes at any moment, without weights and gradients."""
        with self.alive() as alive:
            hidden_BTD, _ = self.forward()
            with self.precision():
                hidden_ND, head_VD, chunk = hidden_BTD.flatten(0, 1), self.model.head_weight, self.share.loss_chunk
                loss = cross_entropy(hidden_ND, head_VD, self.labels_N, None, chunk).weighted
            loss.backward()
        return alive.peak


@pytest.mark.parametrize("numbers", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recompute", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_is_counted_to_a_thousandth(name: str, recompute: Kind, numbers: Numbers) -> None:
    """Left are tables of a few bytes a layer, and of places of a row where layers are run again."""
    share = Share(N, numbers, recompute)
    kept = Step(settings_of(name), share).kept()
    counted = memory(settings_of(name), VOCAB_SIZE, "adamw", share).activations
    assert 0 <= kept - counted <= 8 * LENGTH + 64, (kept, counted)
    assert kept == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("name", DROPPING)
def test_where_slots_go_nowhere_what_is_kept_is_counted_to_a_tenth(name: str) -> None:
    kept = Step(settings_of(name), Share(N, FP32)).kept()
    assert memory(settings_of(name), VOCAB_SIZE, "adamw", Share(N, FP32)).activations == pytest.approx(kept, rel=0.1)


PEAKS = (
    "dense",
    "latent",
    "experts",
    "experts after a dense layer",
    "shared experts",
    "a wide layer below narrow ones",
)


@pytest.mark.parametrize("recompute", KINDS)
@pytest.mark.parametrize("chunk", [64, 4096])
@pytest.mark.parametrize("name", PEAKS)
def test_the_most_at_any_moment_is_told_to_an_eighth(name: str, chunk: int, recompute: Kind) -> None:
    share = Share(N, FP32, recompute, loss_chunk=chunk)
    needed = memory(settings_of(name), VOCAB_SIZE, "adamw", share)
    assert needed.total - needed.states == pytest.approx(Step(settings_of(name), share).peak(), rel=0.125)


@pytest.mark.parametrize("recompute", KINDS)
@pytest.mark.parametrize("name", PEAKS)
def test_all_that_a_rank_needs_is_told_to_a_tenth(name: str, recompute: Kind) -> None:
    needed = memory(settings_of(name), VOCAB_SIZE, "adamw", Share(N, FP32, recompute))
    assert needed.total == pytest.approx(
        needed.states + Step(settings_of(name), Share(N, FP32, recompute)).peak(), rel=0.1
    )


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("recompute", KINDS)
@pytest.mark.parametrize("name", PEAKS)
def test_gradients_of_a_single_micro_batch_come_as_activations_go(name: str, recompute: Kind, rows: int) -> None:
    """Down to a row of a few tokens, where most is needed when all gradients are made and all activations gone."""
    share = Share(rows * LENGTH if rows > 1 else 8, FP32, recompute, has_earlier=False)
    step = Step(settings_of(name), share)
    if rows == 1:
        step.first_tokens(8)
    for parameter in step.model.parameters():
        parameter.grad = None
    needed = memory(settings_of(name), VOCAB_SIZE, "adamw", share)
    weights = sum(parameter.nbytes for parameter in step.model.parameters())
    assert needed.total - needed.weights - needed.moments == pytest.approx(max(step.peak(), weights), rel=0.1)
    assert needed.gradients <= weights and needed.gone <= 0
    assert rows > 1 or name != "dense" or (needed.gradients == weights and needed.gone < 0)


@pytest.mark.parametrize("name", ["dense", "latent with small queries", "experts", "shared experts with a gate"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weights_and_moments_are_those_of_a_model_that_trains(kind: str, name: str) -> None:
    settings = settings_of(name)
    model = built(settings)
    section = AdamWSettings(learning_rate=1e-3) if kind == "adamw" else MuonSettings(learning_rate=1e-3)
    optimizer = build_optimizer(model, section)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    values = [
        value
        for inner in optimizer.optimizers
        for state in inner.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    expected = sum(p.nbytes for p in model.parameters()), sum(value.nbytes for value in values)
    assert states(settings, VOCAB_SIZE, kind) == expected


def needs(name: str = "experts", optimizer: str = "adamw", **given: Any) -> Memory:
    return memory(settings_of(name), VOCAB_SIZE, optimizer, replace(Share(N, BF16), **given))


def test_the_parts_are_the_whole() -> None:
    for share in ({}, {"recompute": "ops"}, {"row_ranks": 2, "methods": ("ring",)}):
        needed = needs(**share)
        assert sum(size for _, size in parts(needed)) == needed.total
        beside = needed.temporary + needed.logits + needed.exchange
        assert needed.total == needed.states + needed.activations + beside
    assert "exchange" not in dict(parts(needs())) and "feed forward" in dict(parts(needs("dense")))


def test_what_grows_with_tokens_does_so_in_proportion_and_nothing_else_does() -> None:
    one, two = needs(num_tokens=N), needs(num_tokens=2 * N)
    for part in ("residual", "attention", "router", "experts"):
        assert getattr(two, part) == 2 * getattr(one, part)
    assert two.states == one.states and two.copies == one.copies
    assert two.temporary + two.logits > one.temporary + one.logits


def test_experts_are_shared_among_ranks_and_the_rest_is_not() -> None:
    settings = settings_of("experts")
    experts = 2 * 3 * 32 * 40 * 4
    whole, (weights, moments) = states(settings, VOCAB_SIZE, "adamw"), states(settings, VOCAB_SIZE, "adamw", 4)
    assert whole[0] - weights == 4 * experts * 3 // 4 and whole[1] - moments == 8 * experts * 3 // 4
    alone, shared = needs(), needs(expert_ranks=4, num_ranks=4)
    assert alone.copies - shared.copies == 2 * experts * 3 // 4
    assert shared.experts - alone.experts > N * 32 * 2, "a token for each of its two experts, in bf16"
    assert needs(expert_ranks=2, recompute="full").experts < needs(expert_ranks=2, recompute="ops").experts


def test_ranks_exchange_gradients_in_one_piece_when_activations_are_gone() -> None:
    few = {"num_tokens": 1, "numbers": FP32}
    needed = needs(**few, num_ranks=2)
    assert needed.activations + needed.temporary == needed.weights
    assert needs(**few).total < needed.total and needs(num_ranks=2).total == needs().total


def test_what_is_offloaded_is_here_for_two_layers_at_a_time() -> None:
    plain, moved = (
        needs("a wide layer below narrow ones", numbers=Numbers(2, "cuda"), offload=o) for o in (False, True)
    )
    assert moved.attention == int(plain.attention * 2 / 5) and moved.copies == plain.copies
    assert needs(offload=True) == needs(), "on a CPU nothing moves"


def test_shards_are_whole_for_two_layers_and_both_ends_at_a_time() -> None:
    layer, ends = (32 * (4 + 2 * 2) * 8 + 4 * 8 * 32 + 3 * 32 * 96), 2 * VOCAB_SIZE * 32
    cut = needs("dense", shard_ranks=2)
    assert cut.gathered == 2 * layer * 2 + layer * (2 + 4) + ends * (4 + 4) and cut.copies == 0
    assert needs("dense").gathered == 0 and needs("dense", shard_ranks=2, has_head=False).gathered < cut.gathered
    own = needs(shard_ranks=2, expert_ranks=2)
    assert own.copies == 2 * 3 * 32 * 40 * 4 // 2 * 2, "experts that no other rank has are not gathered"
    assert needs(shard_ranks=2, expert_shard_ranks=2).copies == 0


def test_methods_over_ranks_hold_what_their_names_say() -> None:
    by_method = {name: needs("dense", row_ranks=4, methods=(name,)).exchange for name in EXCHANGE}
    keys = (2 + 4) * 2 * 2 * 8  # a token's keys and values in bf16, and their gradients in fp32
    assert by_method["ring"] == 2 * N * keys
    assert by_method["gather"] == by_method["groupcast"] == 4 * N * keys
    assert by_method["usp"] == by_method["ring"] + by_method["ulysses"]
    assert needs("dense", row_ranks=4, methods=("ring", "gather")).exchange == by_method["gather"]
    assert needs("latent", row_ranks=4, methods=("ring",)).exchange == 2 * N * 6 * (20 + 6)
    assert needs("dense", row_ranks=1, methods=("gather",)).exchange == 0


def test_a_gpu_keeps_the_product_of_gate_and_up_and_norms_heads_in_one_kernel() -> None:
    cpu, gpu = needs("dense"), needs("dense", numbers=Numbers(2, "cuda"))
    assert gpu.feed_forward - cpu.feed_forward == 2 * N * 2 * 96
    assert cpu.attention - gpu.attention == 2 * N * 4 * (4 + 2) * 8


@pytest.mark.parametrize("numbers", [FP32, BF16], ids=["fp32", "bf16"])
def test_the_logits_of_one_chunk_alone_exist_at_a_time(numbers: Numbers) -> None:
    hidden_ND, head_VD = torch.randn(256, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    labels_N = torch.arange(256)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=numbers.is_cast),
        Alive([hidden_ND, head_VD, labels_N]) as alive,
    ):
        cross_entropy(hidden_ND, head_VD, labels_N, None, 64)
    settings = settings_of("dense").model_copy(update={"width": 8})
    counted = _loss(settings, 1000, Share(256, numbers, loss_chunk=64))
    assert alive.peak == pytest.approx(counted, rel=0.03)
