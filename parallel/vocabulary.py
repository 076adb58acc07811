"""The loss of a head whose rows ranks have cut: each makes its part of the logits, and no rank has them all."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.loss import IGNORED, LossSums, product_dtype
from model.loss import cross_entropy as whole_cross_entropy


def cross_entropy(  # noqa: PLR0917 (as `model.loss.cross_entropy`, and who shares the vocabulary)
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None,
    chunk: int,
    group: dist.ProcessGroup | None,
    vocab_size: int,
) -> LossSums:
    """See `model.loss.cross_entropy`; with a group, head_VD is this rank's rows of the head, and the sums are the same
    on all its ranks. The gradient of hidden_ND is then this rank's part of a sum over them.
    """
    if group is None:
        return whole_cross_entropy(hidden_ND, head_VD, labels_N, weights_N, chunk)
    is_target_N = labels_N != IGNORED
    weights_N = is_target_N.float() if weights_N is None else torch.where(is_target_N, weights_N, 0)
    first = group.rank() * -(-vocab_size // group.size())
    weighted, plain = _CrossEntropy.apply(hidden_ND, head_VD, labels_N, weights_N, chunk, group, first)
    return LossSums(weighted, plain, is_target_N.sum())


class _CrossEntropy(torch.autograd.Function):
    """As `model.loss.ChunkedCrossEntropy`: the gradients are made chunk by chunk, while the logits exist."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes by position)
        ctx: Any,
        hidden_ND: Tensor,
        head_vD: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        chunk: int,
        group: dist.ProcessGroup,
        first: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = product_dtype(hidden_ND)
        head = head_vD.to(dtype)
        grad_hidden_ND, grad_head_vD = torch.empty_like(hidden_ND), torch.zeros_like(head_vD)
        losses_N = weights_N.new_empty(weights_N.shape, dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            hidden = hidden_ND[rows].to(dtype)
            logits_nv = (hidden @ head.T).to(losses_N.dtype)
            places_n = labels_N[rows] - first
            is_here_n = (places_n >= 0) & (places_n < len(head))
            places_n1 = places_n.where(is_here_n, 0)[:, None]
            is_here_n1 = is_here_n[:, None].to(logits_nv.dtype)
            log_sum_n = _log_sum(logits_nv, group)
            picked_n = (logits_nv.gather(1, places_n1) * is_here_n1).squeeze(1)
            dist.all_reduce(picked_n, group=group)
            losses_N[rows] = torch.where(labels_N[rows] != IGNORED, log_sum_n - picked_n, 0)
            weights_n1 = weights_N[rows, None].to(logits_nv.dtype)
            grad_nv = logits_nv.sub_(log_sum_n[:, None]).exp_().mul_(weights_n1)
            grad_logits = grad_nv.scatter_add_(1, places_n1, -weights_n1 * is_here_n1).to(dtype)
            grad_hidden_ND[rows] = grad_logits @ head
            grad_head_vD += grad_logits.T @ hidden
        ctx.gradients = (grad_hidden_ND, grad_head_vD)
        plain = losses_N.sum()
        ctx.mark_non_differentiable(plain)
        return (losses_N * weights_N).sum(), plain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weighted: Tensor, _grad_plain: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden_ND, grad_head_vD), ctx.gradients = ctx.gradients, None
        return grad_hidden_ND.mul_(grad_weighted), grad_head_vD.mul_(grad_weighted), None, None, None, None, None


def _log_sum(logits_nv: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log of the sum of exp over the vocabulary of all ranks, (n,)."""
    most_n = logits_nv.amax(dim=1)
    dist.all_reduce(most_n, op=dist.ReduceOp.MAX, group=group)
    sum_n = (logits_nv - most_n[:, None]).exp_().sum(dim=1)
    dist.all_reduce(sum_n, group=group)
    return sum_n.log_() + most_n
