"""The table of backends: choice, refusals and their exact words."""

from dataclasses import replace

import pytest
import torch

from attention.contract import Capability, Needs
from attention.core import BACKENDS, choose, explain, why_not
from attention.reference import Reference
from settings import Refusal

plain = Needs("cpu", torch.float32)


class Limited(Reference):
    name = "limited"
    capability = Capability(("cuda",), (torch.bfloat16,), (), False, False, False, False)

    def unavailable(self) -> str | None:
        return "limited is not installed"


@pytest.fixture
def with_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "limited", Limited())


def test_auto_takes_the_first_able_one() -> None:
    assert choose("auto", plain).name == "sdpa"
    assert (
        choose("auto", replace(plain, window=True, documents=True, unequal_lengths=True, training=True)).name == "sdpa"
    )
    assert choose("auto", Needs("cuda", torch.float32, lse=True)).name == "reference"


def test_by_name_is_what_was_named() -> None:
    for name in BACKENDS:
        assert choose(name, plain).name == name


def test_named_backend_is_never_replaced() -> None:
    with pytest.raises(Refusal) as refusal:
        choose("sdpa", Needs("cuda", torch.float32, lse=True))
    assert str(refusal.value) == (
        'attention.backend=\'sdpa\': gives no log-sum-exp on cuda. Use backend = "reference" or "auto".'
    )


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(Refusal, match="did you mean 'sdpa'"):
        choose("spda", plain)


@pytest.mark.usefixtures("with_limited")
def test_every_reason_is_given() -> None:
    needs = Needs("cpu", torch.float32, lse=True, window=True, documents=True, unequal_lengths=True, training=True)
    assert why_not(BACKENDS["limited"], needs) == [
        "limited is not installed",
        "runs on cuda, not on cpu",
        "takes bfloat16, not float32",
        "gives no log-sum-exp on cpu",
        "has no sliding window",
        "cannot keep documents apart",
        "needs as many queries as keys",
        "has no backward pass",
    ]
    with pytest.raises(Refusal, match=r'limited is not installed; runs on cuda.* Use backend = "sdpa" or "auto"\.$'):
        choose("limited", needs)


@pytest.mark.usefixtures("with_limited")
def test_explain_has_a_row_a_backend() -> None:
    rows = {name: (ok, reason) for name, ok, reason in explain()}
    assert rows["limited"] == (False, "limited is not installed")
    assert rows["sdpa"][0] and "window" in rows["sdpa"][1]
    assert set(rows) == set(BACKENDS)


def test_nothing_can_serve() -> None:
    with pytest.raises(Refusal, match=r"no backend can do this: sdpa takes .*, not int64; reference"):
        choose("auto", Needs("cpu", torch.int64))
