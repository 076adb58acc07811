"""Settings of a layer: what cannot be is refused by name."""

import pytest

from moe.layer import MoE, MoESettings

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
PLAIN = {"num_experts": 8, "experts_per_token": 2, "expert_width": 4}


def test_impossible_settings_are_refused_by_name():
    for changes, expected in (
        ({"experts_per_token": 9}, r"experts_per_token=9 .* num_experts=8"),
        ({"experts_per_token": 1}, r"router\.normalize=false"),
        ({"experts_per_token": 1, "router": {"kind": "random"}}, r"router\.normalize=false"),
        ({"experts_per_token": 1, "num_experts": 1, "null_experts": {"count": 8}}, r"router\.normalize=false"),
        ({"shared_gate": True}, r"num_shared_experts=1"),
        ({"router": {"kind": "expert_choice"}, "capacity": {"factor": 1.0}}, r'capacity .*"expert_choice"'),
        ({"router": {"kind": "uniform"}, "capacity": {"factor": 1.0}}, r'capacity .*"uniform"'),
        ({"router": {"kind": "hash"}, "balance": {"kind": "bias"}}, r'balance\.kind="bias" .*"hash"'),
        ({"router": {"kind": "expert_choice"}, "balance": [{"kind": "bias"}]}, r'balance\.kind="bias"'),
        ({"router": {"kind": "expert_choice"}, "null_experts": {"count": 1}}, r"null_experts means nothing"),
        (
            {"null_experts": {"count": 1}, "router": {"kind": "softmax", "groups": {"count": 2, "keep": 1}}},
            r"leave out null_experts or router\.groups",
        ),
        ({"router": {"kind": "softmax", "groups": {"count": 3, "keep": 1}}}, r"router\.groups\.count=3"),
        ({"router": {"kind": "softmax", "jitter": 1.0}}, r"jitter"),
        ({"null_experts": {"count": 0}}, r"count"),
        ({"capacity": {"factor": 0.0}}, r"factor"),
    ):
        with pytest.raises(ValueError, match=expected):
            MoESettings(**{**PLAIN, **changes})
    one_expert = MoESettings(**{**PLAIN, "experts_per_token": 1, "router": {"kind": "expert_choice"}})
    assert one_expert.needs_whole_rows and not MoESettings(**PLAIN).needs_whole_rows
    assert MoESettings(**PLAIN, capacity={"factor": 2.0}).needs_whole_rows
    for kind in SCORES:
        assert MoESettings(**PLAIN, router={"kind": kind}, balance={"kind": "bias"}).has_bias


def test_a_bias_exists_where_a_rule_moves_it():
    loss, bias = {"kind": "loss"}, {"kind": "bias"}
    for balance, has_bias in ((loss, False), (bias, True), ([], False), ([loss, bias], True)):
        for kind in SCORES:
            layer = MoE(MoESettings(**PLAIN, router={"kind": kind}, balance=balance), 16)
            assert ("router.bias_E" in layer.state_dict()) == has_bias


def test_keys_of_the_default_router_can_be_set_without_naming_it():
    settings = MoESettings(**{**PLAIN, "experts_per_token": 1, "router": {"normalize": False}})
    assert settings.router.kind == "softmax" and not settings.router.normalize
