"""The loss of a head whose rows ranks have cut: that of the whole head, and no rank ever has all logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.loss import IGNORED, LossSums
from model.loss import cross_entropy as whole_cross_entropy
from parallel.layout import Layout
from parallel.mesh import Mesh, ParallelSettings, build_mesh
from parallel.vocabulary import cross_entropy
from tests.parallel.setting import CPU, Setting, assert_close, this_world

N, D, V = 23, 16, 257


class Problem:
    """Hidden states, a head, labels of which some are ignored, and weights."""

    def __init__(self, mesh: Mesh, scale: float = 1.0) -> None:
        self.mesh = mesh
        self.layout = Layout(torch.Size([V, D])).cut("tensor")
        self.hidden_ND, self.head_VD = torch.randn(N, D) * scale, torch.randn(V, D)
        self.labels_N = torch.randint(V, (N,))
        self.labels_N[:4] = torch.tensor([0, V - 1, V // 2, 130])
        self.labels_N[4:10:2] = IGNORED
        self.weights_N = torch.rand(N) * 3
        self.weights_N[1] = 0

    def whole(self, weights_N: Tensor | None, factor: float = 1.7) -> tuple[LossSums, Tensor, Tensor]:
        hidden, head = (x.clone().requires_grad_() for x in (self.hidden_ND, self.head_VD))
        sums = whole_cross_entropy(hidden, head, self.labels_N, weights_N, N)
        (factor * sums.weighted).backward()
        assert hidden.grad is not None and head.grad is not None
        return sums, hidden.grad, self.part(head.grad)

    def own(self, weights_N: Tensor | None, chunk: int, factor: float = 1.7) -> tuple[LossSums, Tensor, Tensor]:
        """The gradient of the hidden states is that of all ranks together."""
        hidden, head = self.hidden_ND.clone().requires_grad_(), self.part(self.head_VD).clone().requires_grad_()
        sums = self.loss(hidden, head, weights_N, chunk)
        (factor * sums.weighted).backward()
        assert hidden.grad is not None and head.grad is not None
        dist.all_reduce(hidden.grad)
        return sums, hidden.grad, head.grad

    def part(self, whole: Tensor) -> Tensor:
        return self.layout.take(whole, self.mesh.grid, self.mesh.world.rank)

    def loss(self, hidden: Tensor, head: Tensor, weights_N: Tensor | None, chunk: int) -> LossSums:
        return cross_entropy(hidden, head, self.labels_N, weights_N, chunk, self.mesh.group("tensor"), V)


def tensor_mesh() -> Mesh:
    return build_mesh(ParallelSettings(tensor=dist.get_world_size()), {}, this_world(), CPU)


Answer = tuple[LossSums, Tensor, Tensor]


def check(title: str, ours: Answer, theirs: Answer, tolerance: float) -> None:
    (our_sums, *our_gradients), (their_sums, *their_gradients) = ours, theirs
    for name in LossSums._fields:
        assert_close(
            f"{title}: {name}", getattr(our_sums, name).detach(), getattr(their_sums, name).detach(), tolerance
        )
    for name, gradient, expected in zip(("hidden", "head"), our_gradients, their_gradients, strict=True):
        assert_close(f"{title}: gradient of {name}", gradient, expected, tolerance)


def case_the_loss_and_its_gradients_are_those_of_the_whole_head() -> None:
    mesh = tensor_mesh()
    for scale, tolerance in ((1.0, 1e-6), (30.0, 1e-5)):  # the second: logits of hundreds, of which exp overflows
        problem = Problem(mesh, scale)
        for weights_N in (None, problem.weights_N):
            for chunk in (5, N, 100):
                theirs, ours = problem.whole(weights_N), problem.own(weights_N, chunk)
                assert ours[0].weighted.isfinite()
                check(f"scale {scale}, weights {weights_N is not None}, chunk {chunk}", ours, theirs, tolerance)


def case_nothing_to_aim_at_is_nothing() -> None:
    problem = Problem(tensor_mesh())
    problem.labels_N[:] = IGNORED
    sums, *gradients = problem.own(None, 5)
    assert float(sums.weighted.detach()) == 0 == float(sums.plain) == int(sums.targets)
    assert all(gradient.eq(0).all() for gradient in gradients)


def case_every_rank_has_the_same_loss_to_the_last_bit() -> None:
    """Or ranks would clip and stop each in its own way."""
    problem = Problem(tensor_mesh())
    sums, *_ = problem.own(problem.weights_N, 5)
    mine = torch.stack([sums.weighted.detach(), sums.plain])
    all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, mine)
    assert all(torch.equal(other, mine) for other in all_ranks)


def case_under_autocast_the_error_is_that_of_the_whole_head() -> None:
    problem = Problem(tensor_mesh())
    exact = problem.whole(problem.weights_N)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = problem.whole(problem.weights_N), problem.own(problem.weights_N, 5)
    for ours_x, theirs_x, exact_x in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert ours_x.dtype == torch.float32
        assert (ours_x - exact_x).norm() <= 2 * (theirs_x - exact_x).norm()
    assert abs(ours[0].plain - exact[0].plain) <= 2 * abs(theirs[0].plain - exact[0].plain) + 1e-4


def case_a_loss_alone_asks_for_no_gradients() -> None:
    problem = Problem(tensor_mesh())
    with torch.no_grad():
        sums = problem.loss(problem.hidden_ND, problem.part(problem.head_VD), problem.weights_N, 5)
    theirs, *_ = problem.whole(problem.weights_N)
    assert_close("weighted", sums.weighted, theirs.weighted.detach())
    assert not sums.weighted.requires_grad


class Shapes(TorchDispatchMode):
    """Of everything that is made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.seen |= {leaf.shape for leaf in tree_leaves(made) if isinstance(leaf, Tensor)}
        return made


def case_no_rank_has_all_logits() -> None:
    problem, most = Problem(tensor_mesh()), -(-V // dist.get_world_size())
    hidden, head = problem.hidden_ND.requires_grad_(), problem.part(problem.head_VD).requires_grad_()
    with Shapes() as shapes:
        problem.loss(hidden, head, problem.weights_N, 5).weighted.backward()
    logits = {shape for shape in shapes.seen if len(shape) == 2 and shape[1] > N and shape[0] != D}
    assert {rows for rows, _ in logits} == {5, N % 5} and max(width for _, width in logits) <= most, shapes.seen


def case_nor_in_a_step_of_training() -> None:
    """No tensor at all of a whole vocabulary's size: neither logits nor embedding, head or a gradient of theirs."""
    if dist.get_world_size() > 2:
        return
    axes = (f"parallel.tensor={dist.get_world_size()}", "model.attention.num_kv_heads=2", "loss_chunk=100")
    setting = Setting(this_world(), *axes)
    microbatches = setting.microbatches(0)
    step_of, setting.microbatches = setting.step, lambda number: microbatches  # type: ignore[method-assign]
    with Shapes() as shapes:
        step_of(0)
    assert any(size in (V // 2, V // 2 + 1) for shape in shapes.seen for size in shape)
    width = setting.config.model.width
    whole = {shape for shape in shapes.seen if shape == (V, width) or shape[-1:] == (V,)}
    assert not whole, whole


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""


def test_alone_it_is_the_loss_of_the_whole_head() -> None:
    torch.manual_seed(0)
    hidden_ND, head_VD, labels_N = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,))
    ours = cross_entropy(hidden_ND, head_VD, labels_N, None, 5, None, V)
    assert all(map(torch.equal, ours, whole_cross_entropy(hidden_ND, head_VD, labels_N, None, 5)))
