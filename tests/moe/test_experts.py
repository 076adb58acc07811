"""Every way to multiply that runs here against the plain loop in fp64, and the loop against finite differences."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe import blocked, kernels
from moe.dispatch import sort_rows
from moe.experts import MATMULS, Experts, choose, loop, unavailable
from settings import Refusal

WIDTH, HIDDEN = 16, 24
WAYS = [name for name in MATMULS if unavailable(name, "cpu", torch.float32, WIDTH, HIDDEN) is None]
FAST = [name for name in WAYS if name != "loop"]
RECOMPUTE = [False, True]


@dataclass(frozen=True)
class Case:
    """A routing table's size, how uneven it is, and which share of its slots goes nowhere."""

    tokens: int
    per_token: int
    experts: int
    skew: float = 0.0
    nowhere: float = 0.0


CASES = {
    "even": Case(60, 2, 5),
    "empty experts": Case(7, 1, 20),
    "all on one": Case(40, 1, 4, skew=50.0),
    "skewed": Case(150, 3, 8, skew=2.0),
    "one per token": Case(33, 1, 7),
    "every expert for every token": Case(9, 5, 5),
    "prime": Case(37, 3, 11),
    "one expert": Case(9, 1, 1),
    "one token": Case(1, 2, 3),
    "no tokens": Case(0, 2, 3),
    "some nowhere": Case(41, 4, 6, nowhere=0.3),
    "most nowhere": Case(30, 12, 12, nowhere=0.9),
    "all nowhere": Case(12, 2, 3, nowhere=1.0),
}


@dataclass(frozen=True)
class Problem:
    """Unit-scale tokens, weights that keep the scale, and the gradient that arrives."""

    chosen_NK: Tensor
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    """x, gates, gate_up, down."""
    grad_ND: Tensor

    def to(self, dtype: torch.dtype, gates: torch.dtype | None = None) -> "Problem":
        x, gates_NK, *weights = (t.detach().to(dtype) for t in self.tensors)
        gates_NK = self.tensors[1].detach().to(gates or torch.promote_types(dtype, torch.float32))
        return Problem(self.chosen_NK, (x, gates_NK, *weights), self.grad_ND.to(dtype))

    def run(self, way: str, recompute_up: bool = False) -> list[Tensor]:
        """out, and the gradients of x, gates, gate_up and down."""
        leaves = [t.detach().requires_grad_() for t in self.tensors]
        out_ND = MATMULS[way](*leaves, sort_rows(self.chosen_NK, len(leaves[2])), recompute_up)
        return [out_ND.detach(), *torch.autograd.grad(out_ND, leaves, self.grad_ND)]


def problem(case: Case, dtype: torch.dtype = torch.float32, width: int = WIDTH, hidden: int = HIDDEN) -> Problem:
    torch.manual_seed(case.tokens)
    scores_NE = torch.randn(case.tokens, case.experts) - case.skew * torch.arange(case.experts)
    chosen_NK = scores_NE.topk(case.per_token, dim=1).indices
    chosen_NK.masked_fill_(torch.rand(chosen_NK.shape) < case.nowhere, case.experts)
    tensors = (
        torch.randn(case.tokens, width),
        torch.rand(chosen_NK.shape),
        torch.randn(case.experts, 2 * hidden, width) / width**0.5,
        torch.randn(case.experts, width, hidden) / hidden**0.5,
    )
    return Problem(chosen_NK, tensors, torch.randn(case.tokens, width)).to(dtype)


def relative(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote reads as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def test_every_way_that_needs_nothing_runs_here() -> None:
    assert {"loop", "blocked", "bmm", "grouped_mm"} <= set(WAYS)


def test_loop_is_the_formula_with_right_gradients() -> None:
    whole = problem(Case(5, 2, 4, nowhere=0.3), torch.float64, width=3, hidden=2)
    x_ND, gates_NK, gate_up, down = whole.tensors
    expected = torch.zeros_like(x_ND)
    for n, slots in enumerate(whole.chosen_NK.tolist()):
        for k, e in enumerate(slots):
            if e < 4:
                gate, up = (gate_up[e] @ x_ND[n]).chunk(2)
                expected[n] += gates_NK[n, k] * (down[e] @ (gate * torch.sigmoid(gate) * up))
    plan = sort_rows(whole.chosen_NK, 4)
    torch.testing.assert_close(loop(*whole.tensors, plan, False), expected)
    leaves = [t.requires_grad_() for t in whole.tensors]
    assert torch.autograd.gradcheck(lambda *t: loop(*t, plan, False), leaves)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("recompute_up", RECOMPUTE)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_the_loop_in_fp64(way: str, case: Case, recompute_up: bool) -> None:
    single = problem(case)
    exact = single.to(torch.float64).run("loop")
    for ours, truth, like in zip(single.run(way, recompute_up), exact, [single.grad_ND, *single.tensors], strict=True):
        assert ours.shape == like.shape and ours.dtype == like.dtype
        assert relative(ours, truth) < 2e-6


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["skewed", "some nowhere", "every expert for every token"])
@pytest.mark.parametrize("way", FAST)
def test_low_precision_is_at_most_twice_as_wrong_as_plain_torch(
    way: str, name: str, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On processors that multiply in it, and on those that do not."""
    monkeypatch.setattr(blocked, "NATIVE_DTYPES", blocked.NATIVE_DTYPES | {dtype} if native else {torch.float32})
    low = problem(CASES[name], dtype, width=32, hidden=64)
    exact = low.to(torch.float64).run("loop")
    for ours, plain, truth in zip(low.run(way), low.run("loop"), exact, strict=True):
        assert ours.dtype == plain.dtype
        assert relative(ours, truth) <= 2 * relative(plain, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["skewed", "some nowhere"])
@pytest.mark.parametrize("way", FAST)
def test_two_runs_and_both_ways_to_remember_are_equal_bit_for_bit(way: str, name: str, dtype: torch.dtype) -> None:
    whole = problem(CASES[name], dtype)
    first = whole.run(way)
    for recompute_up in RECOMPUTE:
        assert all(torch.equal(*pair) for pair in zip(first, whole.run(way, recompute_up), strict=True))


@pytest.mark.parametrize("recompute_up", RECOMPUTE)
@pytest.mark.parametrize("way", FAST)
def test_only_tokens_and_preactivations_are_kept(way: str, recompute_up: bool) -> None:
    whole = problem(CASES["some nowhere"])
    leaves = [t.requires_grad_() for t in whole.tensors]
    plan = sort_rows(whole.chosen_NK, 6)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        MATMULS[way](*leaves, plan, recompute_up)
    given = {t.data_ptr() for t in leaves}
    assert given <= {t.data_ptr() for t in saved}
    own = [tuple(t.shape) for t in saved if t.is_floating_point() and t.data_ptr() not in given]
    num_rows, num_slots = int(plan.offsets_E[-1]), whole.chosen_NK.numel()
    longest = int(plan.offsets_E.diff(prepend=torch.zeros(1)).max())
    rows = {"blocked": num_rows, "bmm": 6 * longest}.get(way, num_slots)
    assert own == ([] if recompute_up else [(rows, 2 * HIDDEN)])


@pytest.mark.parametrize("way", ["auto", *FAST])
def test_the_module_remembers_what_it_was_told_to(way: str) -> None:
    x_ND, gates_NK = problem(CASES["even"]).tensors[:2]
    kept = []
    for recompute in ("none", "up"):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            Experts(5, WIDTH, HIDDEN, way, recompute)(x_ND, problem(CASES["even"]).chosen_NK, gates_NK)
        kept.append(sum(t.shape[-1:] == (2 * HIDDEN,) for t in saved))
    assert kept == [1, 0]


@pytest.mark.parametrize("way", WAYS)
def test_a_second_backward_pass_gives_the_same(way: str) -> None:
    whole = problem(CASES["prime"])
    leaves = [t.requires_grad_() for t in whole.tensors]
    out_ND = MATMULS[way](*leaves, sort_rows(whole.chosen_NK, 11), False)
    first, second = (torch.autograd.grad(out_ND, leaves, whole.grad_ND, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_experts_that_are_equal_are_one_dense_layer(way: str) -> None:
    whole = problem(CASES["prime"])
    x_ND, gates_NK, gate_up, down = whole.tensors
    gate_up, down, gates_NK = gate_up[:1].expand_as(gate_up), down[:1].expand_as(down), gates_NK.softmax(dim=1)
    gate, up = F.linear(x_ND, gate_up[0]).chunk(2, dim=1)
    out_ND = MATMULS[way](
        x_ND, gates_NK, gate_up.contiguous(), down.contiguous(), sort_rows(whole.chosen_NK, 11), False
    )
    assert relative(out_ND, F.linear(F.silu(gate) * up, down[0])) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_names_of_experts_and_order_of_tokens_mean_nothing(way: str) -> None:
    whole = problem(CASES["some nowhere"])
    x_ND, gates_NK, gate_up, down = whole.tensors
    names_E, order_N = torch.randperm(6), torch.randperm(len(x_ND))
    new_name_E = torch.empty(7, dtype=torch.int64).index_copy_(
        0, torch.cat([names_E, torch.tensor([6])]), torch.arange(7)
    )
    tensors = (x_ND[order_N], gates_NK[order_N], gate_up[names_E], down[names_E])
    other = Problem(new_name_E[whole.chosen_NK][order_N], tensors, whole.grad_ND[order_N])
    out, grad_x, grad_gates, *grads = whole.run(way)
    expected = [out[order_N], grad_x[order_N], grad_gates[order_N], *(grad[names_E] for grad in grads)]
    for ours, truth in zip(other.run(way), expected, strict=True):
        assert relative(ours, truth) < 1e-6


@pytest.mark.parametrize("recompute", ["none", "up"])
@pytest.mark.parametrize("way", ["auto", *WAYS])
def test_the_module_bounds_its_rows_and_takes_gradients_of_stride_0(way: str, recompute: str) -> None:
    whole = problem(CASES["most nowhere"])
    x_ND, gates_NK, gate_up, down = (t.requires_grad_() for t in whole.tensors)
    experts = Experts(12, WIDTH, HIDDEN, way, recompute)
    with torch.no_grad():
        experts.gate_up.copy_(gate_up), experts.down.copy_(down)
    num_rows = int((whole.chosen_NK < 12).sum())
    experts(x_ND, whole.chosen_NK, gates_NK, max_rows=num_rows + 3).sum().backward()
    ours = [x_ND.grad, gates_NK.grad, experts.gate_up.grad, experts.down.grad]
    exact = Problem(whole.chosen_NK, whole.tensors, torch.ones_like(x_ND)).to(torch.float64).run("loop")
    for gradient, truth in zip(ours, exact[1:], strict=True):
        assert relative(gradient, truth) < 1e-6


@pytest.mark.parametrize("way", ["auto", *WAYS])
def test_autocast_reaches_the_experts(way: str) -> None:
    experts = Experts(2, 8, 16, way)
    with torch.autocast("cpu", torch.bfloat16):
        out_ND = experts(torch.randn(6, 8), torch.tensor([[0, 1]] * 6), torch.rand(6, 2))
    assert out_ND.dtype == torch.bfloat16
    out_ND.float().square().sum().backward()
    assert experts.gate_up.grad.dtype == torch.float32 and experts.gate_up.grad.abs().sum() > 0


def test_fp64_and_odd_sizes_run_on_auto_and_are_refused_by_name() -> None:
    chosen_NK, gates_NK = torch.tensor([[0], [1], [1]]), torch.rand(3, 1)
    for dtype, width, hidden in ((torch.float64, 8, 8), (torch.float32, 7, 8), (torch.float32, 8, 5)):
        experts = Experts(2, width, hidden).to(dtype)
        x_ND, plan = torch.randn(3, width, dtype=dtype), sort_rows(chosen_NK, 2)
        expected = loop(x_ND, gates_NK, experts.gate_up, experts.down, plan, False)
        for way in ("auto", "bmm"):
            experts.matmul = way
            torch.testing.assert_close(experts(x_ND, chosen_NK, gates_NK), expected)
        experts.matmul = "grouped_mm"
        with pytest.raises(Refusal, match=r'model.moe.experts="grouped_mm": .*use model.moe.experts="auto"'):
            experts(x_ND, chosen_NK, gates_NK)


def test_auto_is_grouped_on_gpus_and_blocked_on_cpus() -> None:
    assert choose("auto", "cpu", torch.float32, 64, 64) == "blocked"
    assert choose("auto", "cuda", torch.bfloat16, 64, 64) == "grouped_mm"
    assert choose("auto", "cuda", torch.float64, 64, 64) == "blocked"
    assert choose("auto", "cuda", torch.bfloat16, 64, 63) == "blocked"


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "for CPUs" in unavailable("bmm", "cuda", torch.float32, 64, 64)
    monkeypatch.setattr(kernels, "why_not", lambda device: f"no GPU on {device}")
    for way in ("fused", "triton"):
        assert unavailable(way, "cpu", torch.float32, 64, 64) == "no GPU on cpu"
    monkeypatch.setattr(kernels, "why_not", lambda device: None)
    assert "not float64" in unavailable("triton", "cuda", torch.float64, 64, 64)
    assert "expert_width=63" in unavailable("fused", "cuda", torch.bfloat16, 64, 63)
    assert unavailable("triton", "cuda", torch.bfloat16, 64, 63) is None
