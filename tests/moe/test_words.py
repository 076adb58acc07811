"""The words for how a model routes, which stand beside its speed."""

from typing import Any

import pytest

from moe.layer import MoESettings
from moe.words import routing_in_words
from settings import validate

GROUPS = {"kind": "sigmoid", "groups": {"count": 4, "keep": 2}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "top-2 of 8, learned"),
        ({"router": GROUPS}, "top-2 of 8, 2 of 4 groups, learned"),
        ({"router": {"kind": "hash"}, "balance": []}, "top-2 of 8, hash"),
        ({"router": {"kind": "random"}, "balance": []}, "top-2 of 8, random (control)"),
        ({"router": {"kind": "uniform"}, "balance": []}, "top-2 of 8, uniform (control)"),
        ({"router": {"kind": "expert_choice"}, "balance": []}, "expert choice, 2 of 8"),
        ({"capacity": {"factor": 1.25}, "num_shared_experts": 1}, "top-2 of 8, learned, capacity 1.25, 1 shared"),
        ({"null_experts": {"count": 4, "output": "zero"}}, "top-2 of 8, learned, 4 null"),
    ],
)
def test_each_way_to_route_has_its_words(changes: dict[str, Any], words: str) -> None:
    table = {"num_experts": 8, "experts_per_token": 2, "expert_width": 4, **changes}
    assert routing_in_words(validate(table, MoESettings, "moe")) == words
    assert routing_in_words(None) == "dense"
