"""The table of backends: choice, refusals and their exact words."""

from dataclasses import fields, replace

import pytest
import torch

from attention.backends.reference import Reference
from attention.contract import PLAIN_FACTS, Capability, Needs, Options, missing
from attention.core import AUTO, BACKENDS, choose, explain, why_not
from attention.mask import Documents, Mask
from settings import Refusal

plain = Needs("cpu", torch.float32)
everything = Needs("cpu", torch.float32, channels=16, training=True, **dict.fromkeys(PLAIN_FACTS, True))
nothing = dict.fromkeys(PLAIN_FACTS, False)


class Limited(Reference):
    """Can next to nothing. And says more than that."""

    name = "limited"
    capability = Capability(("cuda",), (torch.bfloat16,), trainable=False, max_channels=8, **nothing)

    def unavailable(self) -> str | None:
        return "limited is not installed"


@pytest.fixture
def with_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "limited", Limited())


def test_every_backend_stands_under_its_name_and_says_what_it_is() -> None:
    for name, backend in BACKENDS.items():
        assert backend.name == name and (type(backend).__doc__ or "").strip()
    for device, names in AUTO.items():
        assert set(names) <= set(BACKENDS) and len(set(names)) == len(names)
        assert all(device in BACKENDS[name].capability.devices for name in names)
        assert names[-1] == "reference", "auto always ends where everything can be computed"


def test_auto_takes_the_first_able_one() -> None:
    assert choose("auto", plain).name == "sdpa"
    assert choose("auto", replace(plain, softcap=True, training=True)).name == "blockwise"
    for device, names in AUTO.items():
        needs = replace(everything, device=device)
        able = [name for name in names if not why_not(BACKENDS[name], needs)]
        assert choose("auto", needs) is BACKENDS[able[0]]


def test_by_name_is_what_was_named() -> None:
    for name, backend in BACKENDS.items():
        if not why_not(backend, plain):
            assert choose(name, plain) is backend


def test_named_backend_is_never_replaced() -> None:
    with pytest.raises(Refusal) as refusal:
        choose("sdpa", replace(plain, softcap=True))
    assert str(refusal.value) == ('attention.backend=\'sdpa\': has no softcap. Use backend = "blockwise" or "auto".')


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(Refusal, match="did you mean 'sdpa'"):
        choose("spda", plain)


@pytest.mark.usefixtures("with_limited")
def test_every_reason_is_given() -> None:
    assert why_not(BACKENDS["limited"], everything) == [
        "limited is not installed",
        "runs on cuda, not on cpu",
        "takes bfloat16, not float32",
        "takes at most 8 channels a head, not 16",
        "has no backward pass",
        *PLAIN_FACTS.values(),
    ]
    with pytest.raises(
        Refusal, match=r'limited is not installed; runs on cuda.* Use backend = "blockwise" or "auto"\.$'
    ):
        choose("limited", everything)


def test_each_need_is_one_capability() -> None:
    """A need that no record answers, or a record that no need asks, would be silently ignored."""
    assert set(PLAIN_FACTS) < {field.name for field in fields(Capability)}
    assert {field.name for field in fields(Needs)} - set(PLAIN_FACTS) == {"device", "dtype", "channels", "training"}
    able = Capability(("cpu",), (torch.float32,), **nothing)
    narrow = replace(able, max_channels=8)
    assert not missing(narrow, replace(plain, channels=8))
    assert missing(narrow, replace(plain, channels=9)) == ["takes at most 8 channels a head, not 9"]
    for key, clause in PLAIN_FACTS.items():
        assert missing(able, replace(plain, **{key: True})) == [clause]
        assert missing(replace(able, **{key: True}), replace(plain, **{key: True})) == []


@pytest.mark.usefixtures("with_limited")
def test_explain_has_a_row_a_backend() -> None:
    rows = {
        name: (ok, reason)
        for name, ok, reason in explain({"full layers": plain, "softcap": replace(plain, softcap=True), "long": plain})
    }
    assert rows["limited"] == (False, "limited is not installed")
    assert rows["sdpa"][0] and rows["sdpa"][1].endswith(" (auto: for full layers and long)")
    assert rows["blockwise"][1].endswith(" (auto: for softcap)")
    assert rows["reference"] == (True, "Softmax attention as it is written on paper")
    assert set(rows) == set(BACKENDS)


def test_nothing_can_serve() -> None:
    with pytest.raises(Refusal, match=r"no backend can do this: sdpa takes .*, not int64; .*reference"):
        choose("auto", Needs("cpu", torch.int64))
    with pytest.raises(Refusal, match=r"No other backend can either; use another device or dtype\.$"):
        choose("reference", Needs("cpu", torch.int64))


Q = torch.zeros(2, 6, 4, 8)
K = torch.zeros(2, 9, 2, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "options", "expected"),
    [
        (Q, Q, Q, Mask(), Options(), {}),
        (Q, Q, Q, Mask(window=3), Options(), {"window": True}),
        (Q, Q, Q, Mask(documents=Documents((6, 6))), Options(), {"documents": True}),
        (Q, K, K, Mask(), Options(), {"unequal_lengths": True}),
        (Q, K, K, Mask(offset=3), Options(), {"unequal_lengths": True}),
        (Q, K, K, Mask(offset=2), Options(), {"unequal_lengths": True, "offset": True}),
        (Q, Q, Q, Mask(offset=0), Options(), {}),
        (Q, Q, Q, Mask(offset=1), Options(), {"offset": True}),
        (Q, Q, Q, Mask(is_causal=False, offset=1), Options(), {}),
        (Q, K, K, Mask(documents=Documents((6, 6)), key_documents=Documents((9, 9))), Options(),
         {"documents": True, "key_documents": True}),
        (Q, Q, Q, Mask(prefix=2), Options(), {"prefix": True}),
        (Q, Q, Q, Mask(prefix=(0, 0)), Options(), {}),
        (Q, Q, Q, Mask(prefix=(0, 1)), Options(), {"prefix": True}),
        (Q, Q, Q, Mask(first_tokens=2), Options(), {}),
        (Q, Q, Q, Mask(first_tokens=2, window=3), Options(), {"first_tokens": True, "window": True}),
        (Q, Q, Q, Mask(), Options(softcap=5.0), {"softcap": True}),
        (Q, Q, Q, Mask(), Options(is_partial=True), {"partial": True}),
        (Q, Q, Q[..., :4], Mask(), Options(), {"value_channels": True}),
        (Q[..., :4], Q[..., :4], Q, Mask(), Options(), {"value_channels": True}),
    ],
)  # fmt: skip
def test_needs_are_what_the_call_says(q, k, v, mask, options, expected) -> None:  # noqa: PLR0917
    assert Needs.of(q, k, v, mask, options) == Needs("cpu", torch.float32, channels=8, **expected)
    trained = Needs.of(q.bfloat16(), k, v, mask, options, training=True, lse_gradient=True)
    assert trained == Needs("cpu", torch.bfloat16, channels=8, training=True, lse_gradient=True, **expected)


def test_needs_read_as_a_line() -> None:
    assert str(plain) == "cpu float32"
    assert str(replace(plain, training=True, window=True)) == "cpu float32: window, training"
