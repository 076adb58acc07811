"""The chunked loss against torch's whole-logits loss: sums, gradients, ignored rows, autocast, memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.loss import IGNORED, cross_entropy, greedy, token_losses


def problem(num_tokens: int = 50, width: int = 24, vocab: int = 37, seed: int = 0) -> tuple[Tensor, ...]:
    """hidden, head, labels with ignored rows among them, weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width, generator=generator, requires_grad=True)
    head = torch.randn(vocab, width, generator=generator, requires_grad=True)
    labels = torch.randint(vocab, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < 0.2] = IGNORED
    return hidden, head, labels, torch.rand(num_tokens, generator=generator) * 2


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


@settings(max_examples=20, deadline=None)
@given(num_tokens=st.integers(1, 70), chunk=st.integers(1, 90), seed=st.integers(0, 1000), has_weights=st.booleans())
def test_sums_and_gradients_equal_plain_cross_entropy(
    num_tokens: int, chunk: int, seed: int, has_weights: bool
) -> None:
    hidden, head, labels, weights = problem(num_tokens, seed=seed)
    losses = F.cross_entropy(hidden @ head.T, labels, ignore_index=IGNORED, reduction="none")
    theirs = (losses * weights).sum() if has_weights else losses.sum()
    grads_theirs = torch.autograd.grad(3.5 * theirs, (hidden, head))

    sums = cross_entropy(hidden, head, labels, weights if has_weights else None, chunk)
    grads_ours = torch.autograd.grad(3.5 * sums.weighted, (hidden, head))

    assert relative_error(sums.weighted, theirs) <= 1e-6
    assert relative_error(sums.plain, losses.sum()) <= 1e-6
    assert sums.targets.item() == (labels != IGNORED).sum().item()
    assert not sums.plain.requires_grad
    for ours, reference in zip(grads_ours, grads_theirs, strict=True):
        assert relative_error(ours, reference) <= 1e-6


def test_in_fp64_it_is_exact() -> None:
    hidden, head, labels, weights = problem()
    hidden, head = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    losses = F.cross_entropy(hidden @ head.T, labels, ignore_index=IGNORED, reduction="none")
    theirs = torch.autograd.grad((losses * weights).sum(), (hidden, head))
    ours = torch.autograd.grad(cross_entropy(hidden, head, labels, weights, chunk=7).weighted, (hidden, head))
    for mine, reference in zip(ours, theirs, strict=True):
        assert relative_error(mine, reference) <= 1e-14


def test_rows_without_a_target_neither_count_nor_teach() -> None:
    hidden, head, labels, weights = problem()
    sums = cross_entropy(hidden, head, labels, weights, chunk=16)
    sums.weighted.backward()
    ignored = labels == IGNORED
    assert ignored.any()
    assert torch.equal(hidden.grad[ignored], torch.zeros_like(hidden.grad[ignored]))
    changed = weights.masked_fill(ignored, 1e9)
    assert torch.equal(cross_entropy(hidden, head, labels, changed, chunk=16).weighted, sums.weighted)


def test_no_targets_at_all_is_zero_loss_and_zero_gradient() -> None:
    hidden, head, labels, _ = problem()
    sums = cross_entropy(hidden, head, torch.full_like(labels, IGNORED), None, chunk=16)
    sums.weighted.backward()
    assert (sums.weighted.item(), sums.plain.item(), sums.targets.item()) == (0.0, 0.0, 0)
    assert not hidden.grad.any()
    assert not head.grad.any()


@pytest.mark.parametrize("label", [-1, -101, 37])
def test_a_label_outside_the_vocabulary_is_an_error(label: int) -> None:
    hidden, head, labels, _ = problem()
    labels[3] = label
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy(hidden, head, labels, None, chunk=16)


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    hidden, head, labels, _ = problem()
    loss = cross_entropy(hidden, head, labels, None, chunk=16).weighted
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="spent"):
        loss.backward()


def test_a_frozen_head_or_frozen_hidden_states_still_train_the_other() -> None:
    hidden, head, labels, _ = problem()
    expected = torch.autograd.grad(cross_entropy(hidden, head, labels, None, 16).weighted, (hidden, head))
    cross_entropy(hidden, head.detach(), labels, None, 16).weighted.backward()
    cross_entropy(hidden.detach(), head, labels, None, 16).weighted.backward()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(head.grad, expected[1])


def test_without_gradient_the_sums_are_the_same() -> None:
    hidden, head, labels, weights = problem()
    with_gradient = cross_entropy(hidden, head, labels, weights, chunk=16)
    with torch.no_grad():
        without = cross_entropy(hidden, head, labels, weights, chunk=16)
    assert not without.weighted.requires_grad
    assert torch.equal(with_gradient.weighted.detach(), without.weighted)
    assert torch.equal(with_gradient.plain, without.plain)


def test_under_autocast_the_products_are_bf16_and_the_softmax_is_not() -> None:
    hidden, head, labels, weights = problem(400, 64, 300)
    with torch.no_grad():
        hidden.mul_(0.3)
    exact = cross_entropy(hidden.double(), head.double(), labels, weights.double(), chunk=64)
    exact_grads = torch.autograd.grad(exact.weighted, (hidden, head))
    with torch.autocast("cpu", torch.bfloat16):
        ours = cross_entropy(hidden, head, labels, weights, chunk=64)
        plain_losses = F.cross_entropy((hidden @ head.T).float(), labels, ignore_index=IGNORED, reduction="none")
    plain_grads = torch.autograd.grad((plain_losses * weights).sum(), (hidden, head))
    our_grads = torch.autograd.grad(ours.weighted, (hidden, head))
    assert ours.weighted.dtype == torch.float32
    assert relative_error(ours.weighted.double(), exact.weighted) <= 1e-3
    for mine, theirs, truth in zip(our_grads, plain_grads, exact_grads, strict=True):
        assert mine.dtype == torch.float32
        assert relative_error(mine, truth) <= 2 * relative_error(theirs, truth)


def test_token_losses_and_greedy_equal_the_whole_logits() -> None:
    hidden, head, labels, _ = problem()
    logits = hidden @ head.T
    losses = token_losses(hidden, head, labels, chunk=16)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").detach())
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    assert torch.equal(greedy(hidden, head, chunk=16), logits.argmax(dim=-1))


def test_no_tensor_is_ever_as_large_as_the_whole_logits(largest_tensor) -> None:
    num_tokens, width, vocab, chunk = 256, 8, 512, 32
    hidden, head, labels, _ = problem(num_tokens, width, vocab)
    with largest_tensor() as largest:
        cross_entropy(hidden, head, labels, None, chunk).weighted.backward()
        token_losses(hidden, head, labels, chunk)
        greedy(hidden, head, chunk)
    assert largest.numel == chunk * vocab
