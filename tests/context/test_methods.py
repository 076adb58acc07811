"""Every method of attention over ranks gives what one rank with whole rows gives, to the last gradient.

The cases run on 1, 2 and 4 gloo ranks (tests/ranks.py), and on up to 8 virtual ranks in this process.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.attending import Attending
from attention.backends.reference import Reference
from attention.contract import Backend, Needs
from attention.core import BACKENDS
from attention.mask import Documents, Mask
from context.carrier import Carrier
from context.comm import Comm, GroupComm
from context.gather import Gather
from context.groupcast import Groupcast
from context.layout import Layout
from context.local_comm import LocalComm
from context.methods import METHODS, Method, Split, Way, build_method
from context.plan import SplitMask
from context.ring import Ring
from context.ulysses import Ulysses
from settings import Refusal
from tests.context.over_ranks import (
    DOCUMENTS,
    HEADS,
    Case,
    check,
    inputs,
    over_ranks,
    packed,
    share,
    split_case,
)
from tests.context.packed import cut_rows, packed_layouts

EXTRAS = {"plain": {}, "window": {"window": 5}, "sink": {"has_sink": True}, "both": {"window": 9, "has_sink": True}}
KINDS = ("zigzag", "balanced", "contiguous")


def grid() -> list[Case]:
    """Every kind of documents with every kind of heads; window and sink take turns over the kinds of ranks' chunks."""
    return [
        Case(packed(documents), heads, **EXTRAS[extra])
        for documents in DOCUMENTS
        for heads in HEADS.values()
        for extra in ("plain", "both")
    ]


# What gloo ranks run.


def world() -> GroupComm:
    group = dist.group.WORLD
    assert group is not None
    return GroupComm(group)


def run_grid(method: str) -> None:
    comm = world()
    for number, case in enumerate(grid()):
        check(case, split_case(case, KINDS[number % 3], comm.size), build_method(method, comm), comm)


def case_ring() -> None:
    run_grid("ring")


def case_gather() -> None:
    run_grid("gather")


def case_groupcast() -> None:
    run_grid("groupcast")


def case_ulysses() -> None:
    run_grid("ulysses")


def case_usp() -> None:
    comm = world()
    for number, case in enumerate(grid()):
        mask = split_case(case, KINDS[number % 3], comm.size)
        # At most 2 exchange heads: of 4 ranks two groups, with a ring across them.
        check(case, mask, build_method("usp", comm, ulysses=2), comm)


def case_latent_and_fused() -> None:
    comm = world()
    for method in METHODS:
        latent = Case(packed("ragged"), (4, 1), value_channels=6, channels=8, is_latent=True)
        check(latent, split_case(latent, "balanced", comm.size), build_method(method, comm), comm)
        fused = Case(packed("ragged"), window=7)
        check(fused, split_case(fused, "balanced", comm.size), build_method(method, comm), comm, BACKENDS["sdpa"])


def case_ranks_that_disagree_on_documents_raise() -> None:
    comm = world()
    if comm.size > 1:
        disagree(comm)


def disagree(comm: Comm) -> None:
    for method in METHODS:
        case = Case(packed("ragged" if comm.rank == 0 else "one document"))
        mask, split = split_case(case, "zigzag", comm.size), Split(Attending("reference"), build_method(method, comm))
        with pytest.raises(Refusal, match="documents of attention"):
            split(*share(case, mask, comm.rank)[:3], mask)


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 1, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", [name for name in list(globals()) if name.startswith("case_")])
def test_on_gloo_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size][case] == ""


# On virtual ranks.


def on_ranks(size: int, work: Callable[[LocalComm], None]) -> None:
    LocalComm.run(size, work, timeout=30)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(cut=packed_layouts(), key_heads=st.sampled_from([1, 12]), has_sink=st.booleans())
def test_any_documents_and_layouts(
    method: str, cut: tuple[Layout, Documents, int | None], key_heads: int, has_sink: bool
) -> None:
    layout, documents, window = cut
    case = Case(documents, (12, key_heads), window, has_sink, channels=4, value_channels=4, num_rows=layout.num_rows)
    mask = SplitMask(documents=documents, window=window, layout=layout)
    on_ranks(layout.num_ranks, lambda comm: check(case, mask, build_method(method, comm), comm))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [3, 6, 8])
def test_more_ranks(method: str, size: int) -> None:
    heads = {3: (6, 3), 6: (6, 6), 8: (8, 2)}[size]
    case = Case(cut_rows([5, 48, 13, 30], 48, 2), heads, window=17, has_sink=True)
    at_most = 4 if method == "usp" else None
    mask = split_case(case, "zigzag", size)
    on_ranks(size, lambda comm: check(case, mask, build_method(method, comm, at_most), comm))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case",
    [
        Case(packed("ragged"), softcap=2.0, value_channels=4),
        Case(packed("ragged"), (4, 1), value_channels=6, is_latent=True, window=11),
        Case(packed("ragged"), value_channels=8, is_latent=True),
    ],
    ids=["softcap", "latent values", "values that are the keys"],
)
def test_other_scores_and_values(method: str, case: Case) -> None:
    mask = split_case(case, "balanced", 4)
    on_ranks(4, lambda comm: check(case, mask, build_method(method, comm), comm))


@pytest.mark.parametrize("method", METHODS)
def test_the_log_sum_exp_has_a_gradient(method: str) -> None:
    case = Case(packed("ragged"), window=9, has_sink=True)
    mask, whole = split_case(case, "zigzag", 4), Mask(documents=case.documents, window=9)

    def gradients(attend_with_lse: Attending | Split, tensors: Sequence[Tensor], mask: Mask) -> list[Tensor]:
        q, k, v, _, sink = leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out, lse = attend_with_lse.with_lse(q, k, v, mask, sink_H=sink)
        (lse.square().sum() + out.sum()).backward()
        return [leaves[i].grad for i in (0, 1, 2, 4)]

    expected = gradients(Attending("reference"), [x.double() for x in inputs(case)], whole)

    def one(comm: LocalComm) -> None:
        split = Split(Attending("reference"), build_method(method, comm))
        *mine, sink = gradients(split, share(case, mask, comm.rank), mask)
        for a, b in zip((*mine, comm.sum(sink)), expected, strict=True):
            b = b if b.ndim == 1 else mask.layout.shard(b, comm.rank)
            assert (a - b).abs().max() <= 2e-5
        assert all("lse_gradient" in needs for needs in split.picked)

    on_ranks(4, one)


@pytest.mark.parametrize("across", [Gather, Groupcast, Ring])
def test_heads_may_be_exchanged_under_any_carrier(across: Callable[[Comm], Carrier]) -> None:
    case = Case(packed("ragged"), (4, 2), window=9, has_sink=True)
    # Two groups of two that have their chunks in different orders.
    layout = Layout(2, 32, 4, (0, 1, 3, 2, 2, 0, 1, 3))
    mask = SplitMask(documents=case.documents, window=9, layout=layout)
    way = Way("", lambda inner, comm, at_most: Ulysses(inner, comm, across, at_most))
    on_ranks(4, lambda comm: check(case, mask, Method(way, comm, 2), comm))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_disagree_on_documents_are_told(size: int) -> None:
    on_ranks(size, disagree)


# What goes elsewhere, and what is refused.


def backend_of(method: str, comm: Comm) -> Backend:
    return build_method(method, comm).over(Reference())


@pytest.mark.parametrize("method", METHODS)
def test_shares_that_do_not_fit_are_refused(method: str) -> None:
    case = Case(packed("ragged"))
    mask, options = split_case(case, "zigzag", 2), case.options
    q, k, v, _, _ = share(case, mask, 0)

    def refuse(comm: LocalComm) -> None:
        backend = backend_of(method, comm)
        with pytest.raises(Refusal, match="T=15 queries and S=16 keys"):
            backend.forward(q[:, 1:], k, v, mask, options)
        with pytest.raises(Refusal, match="2 x 16 tokens, not 2 x 15"):
            backend.forward(q[:, 1:], k[:, 1:], v[:, 1:], mask, options)
        with pytest.raises(Refusal, match="over 4 ranks, the group has 2"):
            backend.forward(q, k, v, split_case(case, "zigzag", 4), options)
        with pytest.raises(Refusal, match="SplitMask"):
            backend.forward(q, k, v, Mask(), options)

    on_ranks(2, refuse)
    with pytest.raises(Refusal, match="cannot be cut into 6 equal chunks"):
        split_case(case, "zigzag", 3)


def test_heads_that_do_not_divide_are_refused_by_ulysses_alone() -> None:
    case = Case(Documents((24,)), (6, 2), num_rows=1)
    mask = split_case(case, "contiguous", 4)

    def refuse(comm: LocalComm) -> None:
        with pytest.raises(Refusal, match="4 ranks cannot share 6 query heads and 2 key heads; use 2 or 6 ranks"):
            over_ranks(case, mask, build_method("ulysses", comm), comm)
        check(case, mask, build_method("usp", comm), comm)  # pairs, and a ring across them

    on_ranks(4, refuse)


def test_names_and_numbers_are_checked_and_the_page_has_them_all() -> None:
    def refuse(comm: LocalComm) -> None:
        with pytest.raises(Refusal, match="did you mean 'ring'"):
            build_method("rings", comm)
        with pytest.raises(Refusal, match="ulysses=0"):
            build_method("usp", comm, 0)

    on_ranks(1, refuse)
    assert list(METHODS) == ["ring", "gather", "groupcast", "ulysses", "usp"]
    page = (Path(__file__).parents[2] / "docs/sequences.md").read_text()
    for name, way in METHODS.items():
        assert f"| `{name}` | {way.description} |" in page


@pytest.mark.parametrize("method", METHODS)
def test_the_backend_on_a_rank_has_to_do_its_part(method: str) -> None:
    needs = Needs("cpu", torch.bfloat16, window=True, training=True)

    def one(comm: LocalComm) -> None:
        made: Method = build_method(method, comm)
        asked = made.needs(needs)
        assert asked.partial and asked.documents and asked.training and asked.window
        assert asked.offset == asked.unequal_lengths == (method != "ulysses")
        assert not made.needs(replace(needs, window=False)).offset
        split = Split(Attending("reference"), made)
        assert split.backend(needs).name == f"{method}(reference)"
        assert list(split.picked.values()) == ["reference"]
        capability = split.backend(needs).capability
        assert capability.window and not (capability.prefix or capability.first_tokens or capability.key_documents)
        assert split.backend(needs).unavailable() is None

    on_ranks(2, one)
