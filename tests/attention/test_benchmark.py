"""What benchmarks.attention counts and compares with is right: visible pairs, documents, the fp64 slice, the rivals."""

import pytest
import torch

from attention.attend import attend
from attention.backends.reference import Reference
from attention.contract import Options
from attention.mask import Documents, Mask
from benchmarks.attention import measure
from benchmarks.attention_rivals import MASKS, Heads, Ours, Problem, area_of, make_documents, on_slice, sdpa

HEADS = Heads(4, 2, 8)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(is_causal=False),
        Mask(),
        Mask(window=1),
        Mask(window=7),
        Mask(window=99),
        Mask(documents=Documents((9, 1, 40))),
    ],
    ids=str,
)
def test_the_area_is_that_of_the_mask(mask):
    assert area_of(mask, 50) == mask.dense(1, 50, 50, "cpu").sum()


@pytest.mark.parametrize(("length", "count"), [(64, None), (8192, 8), (131072, None)])
def test_documents_fill_the_row_and_are_always_the_same(length, count):
    lengths = make_documents(length, count).lengths
    assert sum(lengths) == length and make_documents(length, count).lengths == lengths
    assert len(lengths) == (count or max(2, length // 2048)) and len(set(lengths)) > 1


@pytest.mark.parametrize("mask", MASKS)
def test_the_slice_is_that_of_the_whole(mask):
    problem = Problem.make(mask, 100, HEADS, torch.float64, "cpu")
    tensors = [x.clone().requires_grad_() for x in (problem.q_1TGC, problem.k_1SGC, problem.v_1SGC)]
    out, _ = attend(Reference(), *tensors, problem.mask, Options())
    whole = torch.autograd.grad(out, tensors, problem.grad_1THC)
    part = on_slice(problem, 30)
    torch.testing.assert_close(part[0], out[0, -30:, :2].detach())
    torch.testing.assert_close(part[1], whole[0][0, -30:, :2])
    for ours, truth in zip(part[2:], whole[1:], strict=True):
        assert (ours is None) == (mask == "full")
        if ours is not None:
            torch.testing.assert_close(ours, truth[0, -30:, 0])


@pytest.mark.parametrize("mask", MASKS)
def test_a_rival_answers_in_our_layout(mask):
    problem = Problem.make(mask, 80, HEADS, torch.float32, "cpu")
    ours, theirs = Ours("reference", problem), sdpa(problem, None)
    torch.testing.assert_close(theirs.forward(), ours.forward(), rtol=1e-4, atol=1e-5)
    for _ in range(2):  # as often as asked
        for a, b in zip(theirs.backward(), ours.backward(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_who_takes_part_is_measured_and_who_does_not_says_why():
    rows = measure(Problem.make("documents", 128, HEADS, torch.float32, "cpu"), rounds=1, budget=1, deadline=1e12)
    by_name = {row["entrant"]: row for row in rows}
    assert by_name["ours, sdpa"]["auto"] and "auto" not in by_name["SDPA"]
    for row in rows:
        assert ("note" in row) != ("forward_ms" in row)
        assert all(row[name] < 1e-5 for name in ("out", "dq", "dk", "dv") if name in row)
    late = measure(Problem.make("causal", 64, HEADS, torch.float32, "cpu"), rounds=1, budget=1, deadline=0)
    assert {row["note"] for row in late} == {"not measured: the time was up"}
