"""What the ranks of a sequence send: just what the plan says, nothing twice, and documents agreed on once."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention.attend import Kept
from attention.attending import Attending
from attention.backends.reference import Reference
from attention.mask import Documents, Mask
from context.comm import Comm, Handle
from context.layout import Layout
from context.local_comm import LocalComm
from context.methods import METHODS, Split, build_method
from context.plan import SplitMask
from context.volume import OVER_TOKENS, Heads, volume
from tests.context.over_ranks import Case, check, inputs, packed, share, split_case


@dataclass
class Counting:
    """Ranks that write down what they send: (call, bytes)."""

    comm: Comm
    sent: list[tuple[str, int]] = field(default_factory=list)

    def __hash__(self) -> int:
        return id(self)

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size

    def shift(self, tensor: Tensor, by: int = 1) -> Handle[Tensor]:
        self.sent.append(("shift", tensor.nbytes))
        return self.comm.shift(tensor, by)

    def all_to_all(self, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> Handle[list[Tensor]]:
        self.sent.append(("all_to_all", sum(x.nbytes for rank, x in enumerate(tensors) if rank != self.rank)))
        return self.comm.all_to_all(tensors, shapes)

    def all_gather(self, tensor: Tensor) -> Handle[Tensor]:
        self.sent.append(("all_gather", (self.size - 1) * tensor.nbytes))
        return self.comm.all_gather(tensor)

    def sum_scatter(self, tensor_W: Tensor) -> Handle[Tensor]:
        self.sent.append(("sum_scatter", tensor_W.nbytes // self.size * (self.size - 1)))
        return self.comm.sum_scatter(tensor_W)

    def check_same(self, value: bytes | str | int, what: str) -> None:
        self.sent.append(("check_same", 0))
        self.comm.check_same(value, what)

    def split(self, size_inside: int) -> "tuple[Counting, Counting]":
        inside, outside = self.comm.split(size_inside)
        return Counting(inside, self.sent), Counting(outside, self.sent)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.sent)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("documents", ["one document", "ragged", "length-1 documents", "within shares"])
@pytest.mark.parametrize("is_latent", [False, True])
def test_what_is_sent_is_what_the_plan_says(method: str, documents: str, is_latent: bool) -> None:
    lengths = Documents((8,) * 8) if documents == "within shares" else packed(documents)
    case = Case(lengths, (4, 1 if is_latent else 2), value_channels=6, is_latent=is_latent)
    mask = split_case(case, "contiguous" if documents == "within shares" else "zigzag", 4)
    heads = Heads(*case.heads, case.channels, case.value_channels, itemsize=4, is_latent=is_latent)

    def one(comm: LocalComm) -> None:
        counting = Counting(comm)
        tensors = share(case, mask, comm.rank)
        values = tensors[1][..., :6] if is_latent else tensors[2]
        backend = build_method(method, counting, 2 if method == "usp" else None).over(Reference())
        out, lse = backend.forward(tensors[0], tensors[1], values, mask, case.options)
        forward = counting.bytes
        backend.backward(tensors[3], tensors[0], tensors[1], values, out, lse, mask, case.options)
        said = volume(mask.plan, heads, method, comm.rank, size_inside=2)
        assert (forward, counting.bytes - forward) == (said.forward, said.backward)
        if method in OVER_TOKENS and not mask.plan.hops:
            assert not counting.sent  # not even an empty message

    LocalComm.run(4, one)


@pytest.mark.parametrize(("owners", "hops"), [((0, 2, 1, 3), (2,)), ((0, 1, 3, 2), (1, 3)), ((0, 3, 2, 1), (3,))])
def test_a_ring_goes_only_where_somebody_reads(owners: tuple[int, ...], hops: tuple[int, ...]) -> None:
    case = Case(Documents((16, 16)), num_rows=1)  # of four chunks, the first two and the last two
    mask = SplitMask(documents=case.documents, layout=Layout(1, 32, 4, owners))
    assert mask.plan.hops == hops

    def one(comm: LocalComm) -> None:
        counting = Counting(comm)
        check(case, mask, build_method("ring", counting), comm)
        assert len(counting.sent) == 3 * len(hops)  # keys forward, backward, and their gradients

    LocalComm.run(4, one)


@pytest.mark.parametrize("method", METHODS)
def test_recomputation_sends_and_computes_nothing_forward(method: str) -> None:
    case = Case(packed("ragged"), has_sink=True)
    mask = split_case(case, "zigzag", 4)

    def one(comm: LocalComm, recomputes: bool) -> tuple[list[tuple[str, int]], list[Tensor]]:
        counting, kept = Counting(comm), Kept()
        split = Split(Attending("reference"), build_method(method, counting))
        q, k, v, grad, sink = (x.clone().requires_grad_() for x in share(case, mask, comm.rank))

        def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return split(q * 2, k, v, mask, sink_H=sink, kept=kept if recomputes else None).sin()

        out = checkpoint(layer, q, k, v, use_reentrant=False) if recomputes else layer(q, k, v)
        (out * grad).sum().backward()
        return counting.sent, [out.detach(), *(x.grad for x in (q, k, v, sink))]

    once, again = (LocalComm.run(4, lambda comm, r=recomputes: one(comm, r)) for recomputes in (False, True))
    for (sent, answers), (sent_again, answers_again) in zip(once, again, strict=True):
        assert sent == sent_again and len(sent) > 2
        assert all(torch.equal(a, b) for a, b in zip(answers, answers_again, strict=True))


def test_documents_are_agreed_on_once_a_micro_batch() -> None:
    case = Case(packed("ragged"))
    full, window = split_case(case, "zigzag", 2), split_case(replace(case, window=5), "zigzag", 2)

    def one(comm: LocalComm) -> None:
        counting = Counting(comm)
        layers = [Split(Attending("reference"), build_method("ring", counting)) for _ in range(2)]
        for mask in (full, window, full):
            for layer in layers:
                layer(*share(case, mask, comm.rank)[:3], mask)
        assert [call for call, _ in counting.sent].count("check_same") == 1
        other = split_case(Case(packed("one document")), "zigzag", 2)
        layers[0](*share(case, other, comm.rank)[:3], other)
        assert [call for call, _ in counting.sent].count("check_same") == 2

    LocalComm.run(2, one)


def test_other_masks_stay_on_the_rank() -> None:
    case = Case(packed("ragged"), window=5)
    q, k, v, _, sink = inputs(case)

    def one(comm: LocalComm) -> None:
        counting, local = Counting(comm), Attending("reference")
        split = Split(local, build_method("ring", counting))
        mask = Mask(documents=case.documents, window=5)
        assert torch.equal(split(q, k, v, mask, sink_H=sink), local(q, k, v, mask, sink_H=sink))
        for a, b in zip(split.with_lse(q, k, v, Mask()), local.with_lse(q, k, v, Mask()), strict=True):
            assert torch.equal(a, b)
        assert not counting.sent

    LocalComm.run(2, one)
