"""A layer made of a dense one answers as that did, and what cannot be made of it is refused."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moe.layer import MoE, MoESettings
from moe.routing import TokenFacts
from moe.upcycle import CopySettings, DropSettings, SplitSettings, sum_of_gates, upcycle
from settings import Refusal

D, HIDDEN = 16, 24
COPY, SPLIT = CopySettings(), SplitSettings()


def settings(num_experts=6, experts_per_token=3, expert_width=HIDDEN, **others):
    return MoESettings(
        num_experts=num_experts, experts_per_token=experts_per_token, expert_width=expert_width, **others
    )


def dense(dtype=torch.float64, seed=0, hidden=HIDDEN):
    """gate_up (2F, D) and down (D, F) whose gate and up differ in mean and deviation, so that mixing them shows."""
    torch.manual_seed(seed)
    gate, up = torch.randn(hidden, D, dtype=dtype) * 0.3 + 0.1, torch.randn(hidden, D, dtype=dtype) * 0.2 - 0.05
    return torch.cat([gate, up]), torch.randn(D, hidden, dtype=dtype) * 0.25


def answer(gate_up_JD, down_DF, x_ND):
    gate, up = F.linear(x_ND, gate_up_JD).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down_DF)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def upcycled(method, moe, weights, router_std=0.3):
    """The MoE layer with random weights, overwritten by what is made of the dense ones."""
    layer = MoE(moe, D).to(weights[0].dtype).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator(5), std=1.0)
        layer.router.weight.mul_(router_std)
        made = upcycle(method, moe, *weights, layer.router.weight, generator=generator())
        for name, tensor in made.items():
            layer.get_parameter(name).copy_(tensor)
    return layer


def tokens(number=200, dtype=torch.float64):
    return torch.randn(1, number, D, generator=generator(3), dtype=dtype)


def error(out, expected):
    return ((out - expected).norm() / expected.norm()).item()


KINDS = ("softmax", "sigmoid", "sqrt_softplus")
PRESERVING = [
    (COPY, {}),
    (COPY, {"router": {"kind": "softmax", "scale": 2.5}}),
    (COPY, {"num_shared_experts": 2}),
    (COPY, {"num_shared_experts": 1, "shared_gate": True}),
    (COPY, {"router": {"kind": "random"}, "balance": []}),
    (COPY, {"capacity": {"factor": 1.0}}),
    (COPY, {"balance": {"kind": "bias"}}),
    (DropSettings(share=0.0), {}),
    *((COPY, {"router": {"kind": kind}}) for kind in KINDS),
    *((SPLIT, {"expert_width": 8, "router": {"kind": kind}}) for kind in KINDS),
    (SPLIT, {}),
    (SPLIT, {"expert_width": 8, "experts_per_token": 6}),
    (SPLIT, {"expert_width": 12, "experts_per_token": 2, "router": {"kind": "sigmoid", "scale": 2.5}}),
    (SPLIT, {"expert_width": 2, "num_experts": 48, "experts_per_token": 24, "num_shared_experts": 1}),
    (SPLIT, {"expert_width": 8, "router": {"kind": "softmax", "groups": {"count": 2, "keep": 1}}}),
]


@pytest.mark.parametrize(("method", "others"), PRESERVING)
def test_the_new_layer_answers_as_the_dense_one(method, others):
    weights, x_BTD = dense(), tokens()
    layer = upcycled(method, settings(**others), weights)
    out_BTD, stats = layer(x_BTD, facts_of(x_BTD))
    assert error(out_BTD, answer(*weights, x_BTD)) < 1e-12
    assert stats.counts_E.sum() == len(x_BTD[0]) * layer.router.chooser.experts_per_token


def facts_of(x_BTD):
    ids_BT = torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[:2])
    return TokenFacts(ids_BT, ids_BT)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("experts_per_token", [1, 3])
def test_gates_that_are_not_normalized_are_divided_out_as_they_are_at_logits_of_0(kind, experts_per_token):
    router = {"kind": kind, "normalize": False, "scale": 1.5}
    weights, x_BTD = dense(), tokens()
    moe = settings(experts_per_token=experts_per_token, router=router)
    layer = upcycled(COPY, moe, weights, router_std=0.0)
    out_BTD, stats = layer(x_BTD)
    assert error(out_BTD, answer(*weights, x_BTD)) < 1e-6  # a score of fp32 is divided out
    torch.testing.assert_close(stats.gates_NK.sum(-1), torch.full((200,), sum_of_gates(moe), dtype=torch.float64))


@pytest.mark.parametrize(("num_copies", "num_shards", "taken"), [(2, 3, 1), (5, 4, 2), (8, 2, 7), (4, 6, 4)])
def test_the_best_experts_are_whole_copies(num_copies, num_shards, taken):
    moe = settings(num_copies * num_shards, num_shards * taken, HIDDEN // num_shards)
    layer = upcycled(SPLIT, moe, dense(torch.float32))
    chosen_NK = layer.router(tokens(20_000, torch.float32)[0]).chosen_NK
    counts_NC = F.one_hot(chosen_NK // num_shards, num_copies).sum(dim=1)
    assert ((counts_NC == 0) | (counts_NC == num_shards)).all()


def test_where_copies_score_the_same_groups_keep_them_whole():
    """Without groups a tie may split a copy; a token of zeros, the one that ties always, has the answer 0 anyway."""
    weights, x_BTD = dense(), tokens()
    groups = {"router": {"kind": "softmax", "groups": {"count": 6, "keep": 2}}}
    tied = upcycled(SPLIT, settings(18, 6, 8, **groups), weights, router_std=0.0)
    assert error(tied(x_BTD)[0], answer(*weights, x_BTD)) < 1e-12
    plain = upcycled(SPLIT, settings(18, 6, 8), weights)
    assert not plain(torch.zeros_like(x_BTD))[0].any()


def test_shards_of_a_copy_and_copies_are_equal_where_they_should_be():
    gate_up, down = dense()
    made = upcycle(SPLIT, settings(6, 3, 8), gate_up, down, torch.randn(6, D), generator=generator())
    assert torch.equal(made["experts.gate_up"][:3], made["experts.gate_up"][3:])
    for shard in range(3):
        units = torch.arange(8) + 8 * shard
        assert torch.equal(made["experts.gate_up"][shard], gate_up[torch.cat([units, HIDDEN + units])])
        assert torch.equal(made["experts.down"][shard], 3 * down[:, units])
    rows = made["router.weight"]
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[3], rows[5]) and not torch.equal(rows[2], rows[3])


def test_nothing_dense_is_changed():
    gate_up, down = dense()
    before = gate_up.clone(), down.clone()
    for method in (COPY, SPLIT, DropSettings(share=1.0)):
        upcycle(method, settings(), gate_up, down, torch.randn(6, D), generator=generator())
    assert torch.equal(gate_up, before[0]) and torch.equal(down, before[1])


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_of_each_experts_units_is_drawn_anew(share):
    gate_up, down = dense()
    made = upcycle(DropSettings(share=share), settings(), gate_up, down, torch.randn(6, D), generator=generator())
    assert "router.weight" not in made
    gate_EFD, up_EFD = made["experts.gate_up"].chunk(2, dim=1)
    changed = [
        (gate_EFD != gate_up[:HIDDEN]).flatten(2),
        (up_EFD != gate_up[HIDDEN:]).flatten(2),
        (made["experts.down"] != down).transpose(1, 2),
    ]
    is_new_EF = changed[0].all(-1)
    assert (is_new_EF.sum(dim=1) == round(share * HIDDEN)).all()
    for is_new in changed:  # the same units in all three, whole units, and nothing else
        assert torch.equal(is_new.all(-1), is_new_EF) and torch.equal(is_new.any(-1), is_new_EF)
    if share < 1:
        assert len({tuple(row.tolist()) for row in is_new_EF}) > 1, "each expert forgets other units"
    assert not torch.equal(gate_EFD[0][is_new_EF[0]], gate_EFD[1][is_new_EF[1]])


def test_what_is_drawn_has_the_mean_and_deviation_of_its_matrix():
    gate_up, down = dense(hidden=2000)
    moe = settings(2, 2, 2000)
    made = upcycle(DropSettings(share=1.0), moe, gate_up, down, torch.randn(2, D), generator=generator())
    gate_EFD, up_EFD = made["experts.gate_up"].chunk(2, dim=1)
    old = (gate_up[:2000], gate_up[2000:], down)
    for new, matrix in zip((gate_EFD, up_EFD, made["experts.down"]), old, strict=True):
        for expert in new:
            assert abs(expert.mean() - matrix.mean()) < 4 * matrix.std() / matrix.numel() ** 0.5
            assert expert.std().item() == pytest.approx(matrix.std().item(), rel=0.02)


def test_draws_are_a_function_of_the_generators_seed():
    def drawn(seed):
        weights = (*dense(), torch.randn(6, D))
        return upcycle(DropSettings(share=0.5), settings(), *weights, generator=generator(seed))["experts.down"]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize(
    ("method", "others", "expected"),
    [
        (COPY, {"expert_width": 8}, r'kind="copy".*expert_width=8 must be the dense feed_forward_width=24.*"split"'),
        (DropSettings(), {"expert_width": 32}, r'kind="drop".*expert_width=32 must be'),
        (SPLIT, {"expert_width": 7}, "expert_width=7 must divide.*=24; try 6"),
        (SPLIT, {"expert_width": 48}, "expert_width=48 must divide.*try 24"),
        (SPLIT, {"expert_width": 6}, "num_experts=6 must be a multiple of the 4 shards.*try 8"),
        (SPLIT, {"expert_width": 12}, "experts_per_token=3 must be a multiple of the 2 shards.*try 4"),
        (SPLIT, {"expert_width": 8, "router": {"kind": "hash"}}, "takes its K best experts"),
        (SPLIT, {"expert_width": 8, "router": {"kind": "expert_choice"}}, "takes its K best experts"),
        (SPLIT, {"expert_width": 8, "null_experts": {"count": 2}}, "null_experts"),
        (
            SPLIT,
            {"expert_width": 8, "router": {"kind": "softmax", "groups": {"count": 3, "keep": 2}}},
            "groups.count=3 cuts copies of 3 shards apart; try 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(method, others, expected):
    with pytest.raises(Refusal, match=f"initial.upcycle.*{expected}"):
        upcycle(method, settings(**others), *dense(), torch.randn(6, D), generator=generator())


@pytest.mark.parametrize(("method", "expert_width"), [(COPY, HIDDEN), (SPLIT, 8)])
def test_transformers_mixtral_fed_with_it_answers_as_their_dense_layer(method, expert_width):
    gate_up, down = dense(torch.float32)
    llama = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=HIDDEN, num_attention_heads=2, num_key_value_heads=2))
    config = MixtralConfig(
        hidden_size=D,
        intermediate_size=expert_width,
        num_local_experts=6,
        num_experts_per_tok=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    mixtral = MixtralSparseMoeBlock(config).eval()
    with torch.no_grad():
        for linear, weight in zip((llama.gate_proj, llama.up_proj), gate_up.chunk(2), strict=True):
            linear.weight.copy_(weight)
        llama.down_proj.weight.copy_(down)
        mixtral.gate.weight.normal_(generator=generator(5))
        made = upcycle(
            method, settings(expert_width=expert_width), gate_up, down, mixtral.gate.weight, generator=generator()
        )
        mixtral.experts.gate_up_proj.copy_(made["experts.gate_up"])
        mixtral.experts.down_proj.copy_(made["experts.down"])
        mixtral.gate.weight.copy_(made.get("router.weight", mixtral.gate.weight))
        x_BTD = tokens(dtype=torch.float32)
        assert error(mixtral(x_BTD), llama(x_BTD)) < 1e-6
