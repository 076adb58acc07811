"""What a layer calls: one choice for each thing that is asked, and it says which."""

import pytest
import torch

from attention.attend import Kept, attend
from attention.attending import Attending
from attention.backends.reference import Reference
from attention.contract import Needs, Options
from attention.core import BACKENDS, choose
from attention.mask import Mask
from settings import Refusal

MASK = Mask(window=3)


def draw(requires_grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, 6, 2, 4, requires_grad=requires_grad) for _ in range(3)]


def test_is_the_function_with_what_it_was_built_with() -> None:
    tensors, sink_H = draw(), torch.randn(2)
    attending = Attending("reference", scale=0.3, softcap=2.0)
    wanted, wanted_lse = attend(Reference(), *tensors, MASK, Options(0.3, 2.0), sink_H=sink_H)
    assert torch.equal(attending(*tensors, MASK, sink_H=sink_H), wanted)
    out, lse = attending.with_lse(*tensors, MASK, sink_H=sink_H)
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
    kept = Kept()
    attending(*tensors, MASK, sink_H=sink_H, kept=kept)
    assert kept.out_BTHE is not None and torch.equal(kept.out_BTHE, wanted)


def test_chooses_once_for_each_thing_and_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Needs] = []
    monkeypatch.setattr("attention.attending.choose", lambda name, needs: asked.append(needs) or choose(name, needs))
    attending = Attending()
    assert attending.picked == {}
    for _ in range(3):
        attending(*draw(), MASK)
        attending(*draw(), Mask())
    assert len(asked) == 2 and attending.picked == {"cpu float32": "sdpa", "cpu float32: window": "sdpa"}
    attending(*draw(requires_grad=True), Mask())
    assert attending.picked["cpu float32: training"] == "sdpa" and len(asked) == 3
    with torch.no_grad():
        attending(*draw(requires_grad=True), MASK)
    assert len(asked) == 3, "without a graph nothing is trained"


def test_a_sink_that_learns_alone_is_training() -> None:
    attending = Attending("reference")
    sink_H = torch.zeros(2, requires_grad=True)
    attending(*draw(), Mask(), sink_H=sink_H).sum().backward()
    assert attending.picked == {"cpu float32: training": "reference"} and sink_H.grad is not None and sink_H.grad.any()


def test_a_named_backend_is_used_or_refused() -> None:
    attending = Attending("sdpa", softcap=1.0)
    with pytest.raises(Refusal, match="'sdpa': has no softcap"):
        attending(*draw(), Mask())
    with pytest.raises(Refusal, match="did you mean 'blockwise'"):
        Attending("blokwise")
    for name in BACKENDS:
        assert Attending(name).name == name


def test_start_up_can_ask_before_anything_runs() -> None:
    attending = Attending()
    needs = Needs("cpu", torch.float32, documents=True, training=True)
    assert attending.backend(needs) is BACKENDS["sdpa"]
    assert attending.picked == {"cpu float32: documents, training": "sdpa"}


def test_the_log_sum_exp_has_its_gradient() -> None:
    q, k, v = draw(requires_grad=True)
    attending = Attending()
    _, lse = attending.with_lse(q, k, v, Mask())
    lse.sum().backward()
    assert attending.picked == {"cpu float32: lse_gradient, training": "sdpa"}
    # The first query sees the first key alone: its log-sum-exp is q k / sqrt(4).
    assert q.grad is not None and torch.allclose(q.grad[:, 0], k.detach()[:, 0] / 2)
