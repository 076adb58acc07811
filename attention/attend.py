"""Attention with gradients, whatever computes it: one autograd function over a backend's forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention.contract import PLAIN, Backend, Options
from attention.mask import Mask

Keep = Callable[[Tensor], Callable[[], Tensor]]
"""Puts a tensor where it is kept, and returns what gives it back."""


def in_place(tensor: Tensor) -> Callable[[], Tensor]:
    """A Keep that leaves it where it is."""
    return lambda: tensor


@dataclass
class Kept:
    """What a first pass answered, for its recomputation: attention, and what it sends around, is not done twice."""

    keep: Keep = in_place
    answer: tuple[Callable[[], Tensor], Callable[[], Tensor]] | None = None

    @property
    def out_BTHE(self) -> Tensor | None:
        return None if self.answer is None else self.answer[0]()

    def put(self, out_BTHE: Tensor, lse_BHT: Tensor) -> None:
        """Detached: an output that knows its own graph would keep it alive in a circle."""
        self.answer = self.keep(out_BTHE.detach()), self.keep(lse_BHT.detach())

    def forget(self) -> None:
        self.answer = None


def attend(  # noqa: PLR0917 (q, k, v and mask are what attention is about)
    backend: Backend,
    q_BTHC: Tensor,
    k_BSGC: Tensor,
    v_BSGE: Tensor,
    mask: Mask,
    options: Options = PLAIN,
    *,
    sink_H: Tensor | None = None,
    kept: Kept | None = None,
    needs_lse_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax attention by `backend`: (out (B, T, H, E) in q's dtype, log-sum-exp (B, H, T) fp32).

    sink_H: a learned score per head that joins every softmax and holds no value (gpt-oss); the log-sum-exp counts it.
    kept: filled at the first call; a later call with it, a recomputation, computes nothing forward.
    needs_lse_gradient: whether the log-sum-exp carries a gradient; the backend must be able to take it.
    """
    q_BTHC, k_BSGC, v_BSGE = map(with_channels_together, (q_BTHC, k_BSGC, v_BSGE))
    return Attend.apply(q_BTHC, k_BSGC, v_BSGE, sink_H, backend, mask, options, kept, needs_lse_gradient)


def with_channels_together(x: Tensor) -> Tensor:
    """The tensor, or a copy where a head's channels do not lie side by side: fused kernels would read past it."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Attend(torch.autograd.Function):
    """A backend's forward and backward, and the sink around them: with it, the parts are those of a larger softmax."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes by position)
        ctx: Any,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGE: Tensor,
        sink_H: Tensor | None,
        backend: Backend,
        mask: Mask,
        options: Options,
        kept: Kept | None,
        needs_lse_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        if kept is not None and kept.answer is not None:
            out_BTHE, lse_BHT = (give().detach() for give in kept.answer)
        else:
            with _own_precision(q_BTHC):
                out_BTHE, lse_BHT = _forward(backend, q_BTHC, k_BSGC, v_BSGE, sink_H, mask, options)
            if kept is not None:
                kept.put(out_BTHE, lse_BHT)
        ctx.save_for_backward(q_BTHC, k_BSGC, v_BSGE, sink_H, out_BTHE, lse_BHT)
        ctx.backend, ctx.mask, ctx.options, ctx.kept = backend, mask, options, kept
        ctx.set_materialize_grads(False)
        if not needs_lse_gradient:
            ctx.mark_non_differentiable(lse_BHT)
        return out_BTHE, lse_BHT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHE: Tensor | None, grad_lse_BHT: Tensor | None) -> tuple[Tensor | None, ...]:
        q_BTHC, k_BSGC, v_BSGE, sink_H, out_BTHE, lse_BHT = ctx.saved_tensors
        if ctx.kept is not None:  # what recomputes is done with it, and torch's checkpoint would hold on to it
            ctx.kept.forget()
        if grad_BTHE is None:
            grad_BTHE = torch.zeros_like(out_BTHE)
        grad_BTHE = with_channels_together(grad_BTHE)
        with _own_precision(q_BTHC):
            gradients = ctx.backend.backward(
                grad_BTHE, q_BTHC, k_BSGC, v_BSGE, out_BTHE, lse_BHT, ctx.mask, ctx.options, grad_lse_BHT
            )
        grad_sink_H = None
        if sink_H is not None:
            delta_BHT = (grad_BTHE.to(lse_BHT.dtype) * out_BTHE.to(lse_BHT.dtype)).sum(-1).transpose(1, 2)
            if grad_lse_BHT is not None:
                delta_BHT = delta_BHT - grad_lse_BHT
            weight_BHT = (sink_H.to(lse_BHT.dtype)[:, None] - lse_BHT).exp().nan_to_num(0.0)
            grad_sink_H = -(weight_BHT * delta_BHT).sum(dim=(0, 2)).to(sink_H.dtype)
        return (*gradients, grad_sink_H, None, None, None, None, None)


def _own_precision(like: Tensor) -> torch.autocast:
    """Autocast off: inside, a backend accumulates as it says it does."""
    return torch.autocast(like.device.type, enabled=False)


def _forward(  # noqa: PLR0917 (as in the contract)
    backend: Backend,
    q_BTHC: Tensor,
    k_BSGC: Tensor,
    v_BSGE: Tensor,
    sink_H: Tensor | None,
    mask: Mask,
    options: Options,
) -> tuple[Tensor, Tensor]:
    if sink_H is None:
        return backend.forward(q_BTHC, k_BSGC, v_BSGE, mask, options)
    # The sink's share is taken off before the one rounding, where the backend leaves it to us.
    inner = replace(options, is_partial=True) if backend.capability.partial else options
    out_BTHE, lse_BHT = add_sink(*backend.forward(q_BTHC, k_BSGC, v_BSGE, mask, inner), sink_H)
    return (out_BTHE if options.is_partial else out_BTHE.to(q_BTHC.dtype)), lse_BHT


def add_sink(out_BTHE: Tensor, lse_BHT: Tensor, sink_H: Tensor) -> tuple[Tensor, Tensor]:
    """The same attention when each head's softmax has one more score, `sink_H`, and nothing to add for it."""
    total_BHT = torch.logaddexp(lse_BHT, sink_H.to(lse_BHT.dtype)[:, None].expand_as(lse_BHT))
    # Nothing seen and a sink of -inf: -inf minus -inf would be NaN.
    share_BTH1 = (lse_BHT - total_BHT).exp().nan_to_num(0.0).transpose(1, 2)[..., None]
    return (out_BTHE * share_BTH1).to(out_BTHE.dtype), total_BHT
