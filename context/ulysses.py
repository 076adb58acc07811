"""Ulysses: ranks exchange tokens for heads, so that each has whole sequences of some heads, and back.

Jacobs et al. 2023 (DeepSpeed Ulysses, section 3); with rings across such groups, Fang and Zhao 2024 (USP).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attention.contract import Backend, Capability, Options
from attention.mask import Mask
from context.carrier import Carrier
from context.comm import Comm
from context.heads import HeadGroup, check_heads, largest_group
from context.layout import Layout
from context.plan import SplitMask
from context.tiles import Spread, check_split
from context.wire import Wire


@dataclass(frozen=True)
class Ulysses:
    """A backend over ranks: neighbours exchange heads; across their groups, if they are not all, keys are carried.

    Queries, keys and values are exchanged once more in the backward pass, so that what waits for it is what would wait
    without ranks, and a recomputation sends nothing. Where ranks outnumber key heads, a key head goes to several, and
    the gradients that come back of it are added up in fp32.
    """

    inner: Backend
    comm: Comm
    across: Callable[[Comm], Carrier] | None = None
    """What carries keys across groups; None: all ranks are one group, or are refused."""
    at_most: int | None = None
    """The largest group, where there may be several; None: as large as the heads allow."""

    @property
    def name(self) -> str:
        return f"{'ulysses' if self.across is None else 'usp'}({self.inner.name})"

    @property
    def capability(self) -> Capability:
        return replace(self.inner.capability, prefix=False, first_tokens=False, key_documents=False)

    def unavailable(self) -> str | None:
        return self.inner.unavailable()

    def forward(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options
    ) -> tuple[Tensor, Tensor]:
        """See `attention.contract.Backend`; q, k and v are this rank's (B, T / W, ...), the mask is a `SplitMask`."""
        split = check_split(q_BTHC, k_BSGC, mask, self.comm)
        group, inner, its_mask = self._group(q_BTHC.shape[2], k_BSGC.shape[2], split, q_BTHC.device)
        wire = Wire.of(k_BSGC, v_BSGE)
        q, *parts = group.to_heads([q_BTHC, *wire.parts(k_BSGC, v_BSGE)])()
        out, lse = inner.forward(q, *wire.whole(parts), its_mask, options)
        outs = group.to_tokens([out], q_BTHC.shape[2])
        lses = group.to_tokens([lse.transpose(1, 2)[..., None]], q_BTHC.shape[2])
        return outs()[0], lses()[0].squeeze(-1).transpose(1, 2)

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
        """See `attention.contract.Backend`."""
        H, G, split = q_BTHC.shape[2], k_BSGC.shape[2], check_split(q_BTHC, k_BSGC, mask, self.comm)
        group, inner, its_mask = self._group(H, G, split, q_BTHC.device)
        wire = Wire.of(k_BSGC, v_BSGE)
        sums = [lse_BHT] if grad_lse_BHT is None else [lse_BHT, grad_lse_BHT]
        heads = group.to_heads([q_BTHC, *wire.parts(k_BSGC, v_BSGE)])
        answers = group.to_heads([grad_BTHE, out_BTHE])
        sums_of_heads = group.to_heads([x.transpose(1, 2)[..., None] for x in sums])
        (q, *parts), (grad, out) = heads(), answers()
        lse, *grad_lse = (x.squeeze(-1).transpose(1, 2) for x in sums_of_heads())
        # The gradient of a key head that several ranks have is a sum.
        partial = replace(options, is_partial=options.is_partial or group.size > G)
        grad_q, grad_k, grad_v = inner.backward(
            grad, q, *wire.whole(parts), out, lse, its_mask, partial, grad_lse[0] if grad_lse else None
        )
        queries = group.to_tokens([grad_q if options.is_partial else grad_q.to(q.dtype)], H)
        keys = group.to_tokens(wire.gradient_parts(grad_k, grad_v), G)
        grad_k, grad_v = wire.gradients(*wire.whole(keys()))
        if not options.is_partial:
            grad_k, grad_v = grad_k.to(k_BSGC.dtype), grad_v.to(v_BSGE.dtype)
        return queries()[0], grad_k, grad_v

    def _group(self, H: int, G: int, mask: SplitMask, device: torch.device) -> tuple[HeadGroup, Backend, Mask]:
        """The neighbours that exchange heads, what computes on the tokens that they have together, and their mask."""
        num_ranks = self.comm.size
        if self.across is None:
            check_heads(H, G, num_ranks)
        size = num_ranks if self.across is None else largest_group(H, G, num_ranks, self.at_most)
        if size == num_ranks:
            group = HeadGroup(self.comm, places(mask.layout, size, 0, device))
            return group, self.inner, Mask(documents=mask.documents, window=mask.window)
        assert self.across is not None
        inside, outside = self.comm.split(size)
        group = HeadGroup(inside, places(mask.layout, size, outside.rank, device))
        return group, Spread(self.inner, self.across(outside)), replace(mask, layout=mask.layout.joined(size))


@lru_cache(maxsize=64)
def places(layout: Layout, size: int, group: int, device: torch.device) -> tuple[Tensor, ...]:
    """For each rank of a group of neighbours, where its tokens stand among those of the group, ascending."""
    order = layout.joined_order(range(group * size, (group + 1) * size), device)
    return order.argsort().chunk(size)
