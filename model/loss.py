"""The loss of a language model's head in chunks over tokens, so that the logits never exist whole.

A label of `IGNORED` (-100) marks a row without a target: its loss and its gradient are 0. Any other label outside the
vocabulary is an error.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100


class LossSums(NamedTuple):
    """Sums over the targets of one micro-batch; nothing is divided before every rank's counts are known."""

    weighted: Tensor
    """Scalar with a gradient: sum of weight * loss, in nats."""
    plain: Tensor
    """Scalar without a gradient: sum of the losses unweighted, in nats."""
    targets: Tensor
    """Scalar int64: how many labels are not IGNORED."""


def cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, weights_N: Tensor | None, chunk: int
) -> LossSums:
    """Sum of weight * cross entropy of `hidden @ head.T` against the labels, `chunk` tokens at a time.

    hidden_ND and head_VD in any floating dtype: the products run in the autocast dtype where autocast is on, the
    softmax in fp32 (fp64 for fp64). The gradients are made in the forward pass, chunk by chunk while its logits exist,
    and only scaled in the backward pass, which can therefore run once. Memory: chunk * V logits beside two gradients.
    """
    is_target_N = labels_N != IGNORED
    weights_N = is_target_N.float() if weights_N is None else torch.where(is_target_N, weights_N, 0)
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or head_VD.requires_grad):
        weighted, plain = ChunkedCrossEntropy.apply(hidden_ND, head_VD, labels_N, weights_N, chunk)
    else:
        losses_N = token_losses(hidden_ND, head_VD, labels_N, chunk)
        weighted, plain = (losses_N * weights_N).sum(), losses_N.sum()
    return LossSums(weighted, plain, is_target_N.sum())


@torch.no_grad()
def token_losses(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, chunk: int) -> Tensor:
    """Loss of every token in nats, fp32 (N,), 0 where the label is IGNORED; no gradient."""
    losses_N = torch.empty(labels_N.shape, dtype=torch.float32, device=labels_N.device)
    for rows, hidden, head in _chunks(hidden_ND, head_VD, chunk):
        losses_N[rows] = _losses(_log_probabilities(hidden, head), labels_N[rows])
    return losses_N


@torch.no_grad()
def greedy(hidden_ND: Tensor, head_VD: Tensor, chunk: int) -> Tensor:
    """The most likely next token of every row: int64 (N,); one of them where several tie."""
    ids_N = torch.empty(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
    for rows, hidden, head in _chunks(hidden_ND, head_VD, chunk):
        ids_N[rows] = (hidden @ head.T).argmax(dim=-1)
    return ids_N


class ChunkedCrossEntropy(torch.autograd.Function):
    """(weighted sum, plain sum) of the token losses; the gradients are made while the logits exist."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes by position)
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, weights_N: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_head_VD = torch.zeros_like(head_VD)
        losses_N = weights_N.new_empty(weights_N.shape, dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        for rows, hidden, head in _chunks(hidden_ND, head_VD, chunk):
            log_probabilities = _log_probabilities(hidden, head)
            losses_N[rows] = _losses(log_probabilities, labels_N[rows])
            grad_logits = _logits_gradient(log_probabilities, labels_N[rows], weights_N[rows]).to(hidden.dtype)
            grad_hidden_ND[rows] = grad_logits @ head
            _add_product(grad_head_VD, grad_logits.T, hidden)
            del log_probabilities, grad_logits  # or they would stand beside the logits of the next chunk
        ctx.gradients = (grad_hidden_ND, grad_head_VD)
        plain = losses_N.sum()
        ctx.mark_non_differentiable(plain)
        return (losses_N * weights_N).sum(), plain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weighted: Tensor, _grad_plain: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss are spent: call cross_entropy again before another backward")
        (grad_hidden_ND, grad_head_VD), ctx.gradients = ctx.gradients, None
        # In place: at this moment every activation is still alive, a second copy would be the peak of memory.
        return grad_hidden_ND.mul_(grad_weighted), grad_head_VD.mul_(grad_weighted), None, None, None, None


def _chunks(hidden_ND: Tensor, head_VD: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, hidden of these rows, head), both factors in the dtype that the products run in."""
    dtype = product_dtype(hidden_ND)
    head_VD = head_VD.to(dtype)
    for start in range(0, len(hidden_ND), chunk):
        rows = slice(start, start + chunk)
        yield rows, hidden_ND[rows].to(dtype), head_VD


def product_dtype(like: Tensor) -> torch.dtype:
    """The dtype that a product of this tensor runs in: the autocast dtype where autocast is on, else its own."""
    device = like.device.type
    is_cast = torch.is_autocast_enabled(device) and like.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else like.dtype


def _log_probabilities(hidden: Tensor, head_VD: Tensor) -> Tensor:
    """log softmax of the logits: fp32 whatever the product's dtype, because bf16 keeps 2 digits of a loss."""
    logits = hidden @ head_VD.T
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _losses(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    is_target = labels != IGNORED
    picked = log_probabilities.gather(1, torch.where(is_target, labels, 0).unsqueeze(1)).squeeze(1)
    return torch.where(is_target, -picked, 0)


def _logits_gradient(log_probabilities: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """weight * (softmax - one hot), written over the log probabilities; rows without a target have weight 0."""
    gradient = log_probabilities.exp_().mul_(weights.unsqueeze(1))
    chosen = torch.where(labels != IGNORED, labels, 0).unsqueeze(1)
    return gradient.scatter_add_(1, chosen, -weights.to(gradient.dtype).unsqueeze(1))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; the sum over chunks stays in total's dtype (fp32 under autocast)."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)  # not addmm_: torch's operation counter does not know it
    else:
        total.add_(left @ right)
