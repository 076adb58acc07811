"""One rank's attention over the keys of all ranks: parts of the mask one after another, added up in fp32.

How the keys come here is a carrier's matter (carrier.py); `Spread` makes a backend of it, so that `attention.attend`
gives it gradients, the learned sink and recomputation.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attention.contract import Backend, Capability, Options
from attention.mask import Mask
from context.carrier import Cargo, Carrier, Delivery
from context.comm import Comm
from context.plan import SplitMask
from context.wire import Wire
from settings import Refusal


@dataclass(frozen=True)
class Spread:
    """A backend over ranks: `inner` computes what the carrier brings. q, k and v are this rank's (B, T / W, ...)."""

    inner: Backend
    carrier: Carrier

    @property
    def name(self) -> str:
        return f"{self.carrier.name}({self.inner.name})"

    @property
    def capability(self) -> Capability:
        return replace(self.inner.capability, prefix=False, first_tokens=False, key_documents=False)

    def unavailable(self) -> str | None:
        return self.inner.unavailable()

    def forward(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options
    ) -> tuple[Tensor, Tensor]:
        """See `attention.contract.Backend`; the mask is a `SplitMask`. Parts are added up in fp32 and cast once."""
        split = check_split(q_BTHC, k_BSGC, mask, self.carrier.comm)
        cargo = Cargo(split.plan, Wire.of(k_BSGC, v_BSGE), flat(k_BSGC), flat(v_BSGE))
        out_1NHE, lse_1HN = _forward(self.inner, flat(q_BTHC), self.carrier.deliver(cargo), options)
        out_1NHE = out_1NHE if options.is_partial else out_1NHE.to(q_BTHC.dtype)
        rows = q_BTHC.shape[:2]
        return out_1NHE[0].unflatten(0, rows), lse_1HN[0].unflatten(1, rows).transpose(0, 1)

    def backward(  # noqa: PLR0917 (as in the contract)
        self,
        grad_BTHE: Tensor,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGE: Tensor,
        out_BTHE: Tensor,
        lse_BHT: Tensor,
        mask: Mask,
        options: Options,
        grad_lse_BHT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `attention.contract.Backend`; the keys come once more, and their gradients go home in fp32."""
        split = check_split(q_BTHC, k_BSGC, mask, self.carrier.comm)
        wire, k_1NGC = Wire.of(k_BSGC, v_BSGE), flat(k_BSGC)
        room_NGX = k_1NGC.new_zeros(*k_1NGC.shape[1:3], wire.channels, dtype=accumulator(k_BSGC))
        cargo = Cargo(split.plan, wire, k_1NGC, flat(v_BSGE), room_NGX)
        answers = _Answers(
            flat(grad_BTHE),
            flat(q_BTHC),
            flat(out_BTHE),
            _flat_heads(lse_BHT),
            None if grad_lse_BHT is None else _flat_heads(grad_lse_BHT),
        )
        grad_q_1NHC = _backward(self.inner, answers, self.carrier.deliver(cargo), options)
        grad_k, grad_v = (x.unflatten(0, k_BSGC.shape[:2]) for x in wire.gradients(*wire.unpack(room_NGX)))
        grad_q = grad_q_1NHC[0].unflatten(0, q_BTHC.shape[:2])
        if options.is_partial:
            return grad_q, grad_k, grad_v
        return grad_q.to(q_BTHC.dtype), grad_k.to(k_BSGC.dtype), grad_v.to(v_BSGE.dtype)


def check_split(q_BTHC: Tensor, k_BSGC: Tensor, mask: Mask, comm: Comm) -> SplitMask:
    """The mask, once it is sure that it fits these shares and these ranks; raises Refusal otherwise."""
    if not isinstance(mask, SplitMask):
        raise Refusal("attention over ranks needs a SplitMask, which says what tokens each rank has; wrap the mask")
    layout = mask.layout
    if q_BTHC.shape[1] != k_BSGC.shape[1]:
        raise Refusal(
            f"T={q_BTHC.shape[1]} queries and S={k_BSGC.shape[1]} keys: a sequence on several ranks is cut for both"
            " alike; give every rank its queries' own keys, or whole rows and a mask that is not split"
        )
    if layout.num_ranks != comm.size:
        raise Refusal(f"the mask is laid out over {layout.num_ranks} ranks, the group has {comm.size}; use one number")
    share = (layout.num_rows, layout.row_length // layout.num_ranks)
    if tuple(q_BTHC.shape[:2]) != share:
        raise Refusal(
            f"a rank's share of this layout is {share[0]} x {share[1]} tokens, not {q_BTHC.shape[0]} x"
            f" {q_BTHC.shape[1]}; cut batches with Layout.shard"
        )
    return mask


def accumulator(tensor: Tensor) -> torch.dtype:
    """The precision in which parts are added up."""
    return torch.promote_types(tensor.dtype, torch.float32)


def flat(x_BN: Tensor) -> Tensor:
    """(B, N, ...) to (1, B * N, ...)."""
    return x_BN.flatten(0, 1)[None]


def merge(out_1NHE: Tensor, lse_1HN: Tensor, part_1NHE: Tensor, part_1HN: Tensor) -> None:
    """Join a part's softmax, over other keys of the same queries, to a running one, in place.

    out = out + share * (part - out), share = exp(part_lse) / (exp(lse) + exp(part_lse)); a query that sees nothing on
    either side, -inf twice, stays as it is.
    """
    is_empty_1HN = torch.maximum(lse_1HN, part_1HN) == float("-inf")
    # Of the difference: the sum's logarithm is rounded, and what is divided by it would be off by as much.
    share_1HN = (part_1HN - lse_1HN).sigmoid().masked_fill_(is_empty_1HN, 0.0)
    out_1NHE.lerp_(part_1NHE, share_1HN.transpose(1, 2)[..., None])
    lse_1HN.copy_(torch.logaddexp(lse_1HN, part_1HN))


def _forward(inner: Backend, q_1NHC: Tensor, deliveries: Iterable[Delivery], options: Options) -> tuple[Tensor, Tensor]:
    partial = replace(options, is_partial=True)
    out_1NHE = lse_1HN = torch.empty(0)
    for delivery in deliveries:
        for part in delivery.parts:
            k, v = delivery.k_1SGC[:, part.keys], delivery.v_1SGE[:, part.keys]
            out, lse = inner.forward(q_1NHC[:, part.queries], k, v, part.mask, partial)
            if not out_1NHE.numel():  # the diagonal, which has all queries, comes first
                out_1NHE, lse_1HN = out, lse
            else:
                merge(out_1NHE[:, part.queries], lse_1HN[..., part.queries], out, lse)
    return out_1NHE, lse_1HN


@dataclass(frozen=True)
class _Answers:
    """What a backward pass knows of each query: the gradients of its answer, itself, and the answer."""

    grad_1NHE: Tensor
    q_1NHC: Tensor
    out_1NHE: Tensor
    lse_1HN: Tensor
    grad_lse_1HN: Tensor | None


def _backward(inner: Backend, answers: _Answers, deliveries: Iterable[Delivery], options: Options) -> Tensor:
    """The gradient of the queries; those of keys and values go where each delivery says."""
    partial = replace(options, is_partial=True)
    grad_q_1NHC = torch.empty(0)
    for delivery in deliveries:
        assert delivery.gradients is not None
        for part in delivery.parts:
            grad, q, out = (x[:, part.queries] for x in (answers.grad_1NHE, answers.q_1NHC, answers.out_1NHE))
            k, v = delivery.k_1SGC[:, part.keys], delivery.v_1SGE[:, part.keys]
            lse, grad_lse = answers.lse_1HN[..., part.queries], answers.grad_lse_1HN
            grad_lse = None if grad_lse is None else grad_lse[..., part.queries]
            grad_q, *grads = inner.backward(grad, q, k, v, out, lse, part.mask, partial, grad_lse)
            if not grad_q_1NHC.numel():  # the diagonal, which has all queries, comes first
                grad_q_1NHC = grad_q
            else:
                grad_q_1NHC[:, part.queries] += grad_q
            for total, one in zip(delivery.gradients, grads, strict=True):
                total[:, part.keys] += one
    return grad_q_1NHC


def _flat_heads(lse_BHT: Tensor) -> Tensor:
    """(B, H, T) to (1, H, B * T)."""
    return lse_BHT.transpose(0, 1).flatten(1)[None]
