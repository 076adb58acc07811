"""Our calls of MegaBlocks against the loop.

Neither MegaBlocks nor grouped_gemm can be installed on a machine without a CUDA compiler: stand-ins compute in plain
torch what their functions are documented to, and refuse what the originals refuse. What the originals make of the same
calls on a GPU is not tested here.
"""

# ruff: noqa: PLR0917 (the stand-ins have the signatures of what they stand in for)

import itertools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from moe import megablocks
from moe.dispatch import sort_rows
from moe.experts import loop
from moe.megablocks import BLOCK

WIDTH, HIDDEN = 128, 256
NAMES = ("out", "x", "gates", "gate_up", "down")


def gmm(a, b, batch_sizes, trans_b=False):
    """grouped_gemm.ops.gmm: each group of rows times its matrix, sizes on the host."""
    assert batch_sizes.device.type == "cpu" and batch_sizes.dtype == torch.int64
    assert a.is_contiguous() and b.is_contiguous() and int(batch_sizes.sum()) == len(a)
    parts = zip(a.split(batch_sizes.tolist()), b.unbind(), strict=True)
    return torch.cat([rows @ (matrix.t() if trans_b else matrix) for rows, matrix in parts])


def padded_places(indices, bin_ids, bins, padded_bins):
    """Where each sorted row stands once every bin is padded."""
    assert bins.dtype == padded_bins.dtype == torch.int32 and len(indices) == len(bin_ids)
    before, padded_before = (torch.nn.functional.pad(ends[:-1], (1, 0)) for ends in (bins, padded_bins))
    return torch.arange(len(indices)) - before[bin_ids] + padded_before[bin_ids]


def padded_gather(x, indices, bin_ids, bins, padded_bins, top_k):
    assert len(indices) == len(x) * top_k
    out = x.new_zeros(int(padded_bins[-1]), x.shape[1])
    return out.index_copy(0, padded_places(indices, bin_ids, bins, padded_bins), x[indices // top_k])


def padded_scatter(x, indices, bin_ids, weights, bins, padded_bins, top_k):
    rows = x[padded_places(indices, bin_ids, bins, padded_bins)] * weights[indices, None]
    # Memory that is not written stays as it is: every slot has to be among the indices.
    out = torch.full((len(indices), x.shape[1]), torch.nan, dtype=x.dtype)
    return out.index_copy(0, indices.long(), rows.to(x.dtype)).view(-1, top_k, x.shape[1]).sum(dim=1)


def topology(padded_bins, block_size, block_rows, block_columns):
    """The block columns of each block of rows: those of the expert it belongs to."""
    experts = torch.searchsorted(padded_bins, torch.arange(block_rows) * block_size, right=True)
    return (experts[:, None] * block_columns + torch.arange(block_columns)).flatten().to(torch.int16)


class Matrix:
    """stk.Matrix: blocks in rows, and the order in which they stand in columns."""

    def __init__(self, size, data, row_indices, column_indices, offsets, column_indices_t, offsets_t, block_offsets_t):
        assert row_indices.dtype == column_indices.dtype == column_indices_t.dtype == torch.int16
        assert offsets.dtype == offsets_t.dtype == block_offsets_t.dtype == torch.int32
        assert len(data) == len(row_indices) == len(column_indices) and data.shape[1:] == (BLOCK, BLOCK)
        assert len(offsets) == size[0] // BLOCK + 1 and len(offsets_t) == size[1] // BLOCK + 1
        for row, (start, stop) in enumerate(itertools.pairwise(offsets)):
            assert (row_indices[start:stop] == row).all()
        for column, (start, stop) in enumerate(itertools.pairwise(offsets_t)):
            assert (column_indices[block_offsets_t[start:stop].long()] == column).all()
        assert torch.equal(column_indices_t, row_indices[block_offsets_t.long()])
        self.shape, self.data, self.row_indices, self.column_indices = size, data, row_indices, column_indices
        self.offsets, self.column_indices_t = offsets, column_indices_t
        self.offsets_t, self.block_offsets_t = offsets_t, block_offsets_t

    def size(self):
        return self.shape

    def places(self):
        """Of each element of each block in the dense matrix."""
        within = torch.arange(BLOCK)
        rows, columns = (at.long()[:, None] * BLOCK + within for at in (self.row_indices, self.column_indices))
        return rows[:, :, None], columns[:, None, :]


def row_indices(shape, data, offsets, column_indices):
    return torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff()).to(column_indices.dtype)


def sdd(a, b, topo):
    assert b.stride() == (1, b.shape[0]) and not (a.shape[0] % BLOCK or a.shape[1] % BLOCK or b.shape[1] % BLOCK)
    data = (a @ b)[topo.places()]
    return Matrix(topo.size(), data, *(vars(topo)[name] for name in INDICES))


INDICES = ("row_indices", "column_indices", "offsets", "column_indices_t", "offsets_t", "block_offsets_t")


def dsd(a, b):
    assert a.size()[1] == b.shape[0] and b.shape[1] % BLOCK == 0
    return torch.zeros(a.size(), dtype=b.dtype).index_put(a.places(), a.data) @ b


def stand_in(name, monkeypatch):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def stand_ins(monkeypatch):
    """grouped_gemm, megablocks and stk, as far as we call them."""
    contents = {
        "grouped_gemm": {},
        "grouped_gemm.ops": {"gmm": gmm},
        "megablocks": {},
        "megablocks.ops": {"padded_gather": padded_gather, "padded_scatter": padded_scatter, "topology": topology},
        "megablocks_ops": {},
        "stk": {"Matrix": Matrix},
        "stk.ops": {"sdd": sdd, "dsd": dsd, "row_indices": row_indices},
    }
    for name, functions in contents.items():
        module = stand_in(name, monkeypatch)
        vars(module).update(functions)
        room, _, own_name = name.rpartition(".")
        if room:
            setattr(sys.modules[room], own_name, module)


def problem(chosen_NK, num_experts):
    torch.manual_seed(0)
    tensors = (
        torch.randn(len(chosen_NK), WIDTH, dtype=torch.float64),
        torch.rand(chosen_NK.shape, dtype=torch.float64).where(chosen_NK < num_experts, torch.nan),
        torch.randn(num_experts, 2 * HIDDEN, WIDTH, dtype=torch.float64) / WIDTH**0.5,
        torch.randn(num_experts, WIDTH, HIDDEN, dtype=torch.float64) / HIDDEN**0.5,
    )
    return [t.requires_grad_() for t in tensors]


ROUTINGS = {
    "uneven": ([[0, 1], [3, 1], [1, 2], [1, 0], [2, 1]], 4),
    "empty experts": ([[1, 3], [3, 1]], 5),
    "more than a block": ([[0]] * 130 + [[1]] * 5, 2),
    "dropped": ([[0, 3], [3, 3], [2, 0], [0, 3]], 3),
    "last expert empty, one dropped": ([[0, 1], [1, 3]], 3),
    "all dropped": ([[2, 2], [2, 2]], 2),
}


@pytest.mark.parametrize("way", [megablocks.grouped, megablocks.sparse], ids=["grouped", "sparse"])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
@pytest.mark.parametrize("recompute_up", [False, True])
@pytest.mark.usefixtures("stand_ins")
def test_equals_the_loop(way, routing, recompute_up):
    chosen_NK, num_experts = torch.tensor(routing[0]), routing[1]
    tensors = problem(chosen_NK, num_experts)
    plan = sort_rows(chosen_NK, num_experts)
    grad_ND = torch.randn_like(tensors[0])
    ours, theirs = way(*tensors, plan, recompute_up), loop(*tensors, plan, False)
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(out, tensors, grad_ND) for out in (ours, theirs))
    for name, own, true in zip(NAMES[1:], *gradients, strict=True):
        torch.testing.assert_close(own, true, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("way", [megablocks.grouped, megablocks.sparse], ids=["grouped", "sparse"])
@pytest.mark.usefixtures("stand_ins")
def test_no_tokens(way):
    chosen_NK = torch.zeros(0, 2, dtype=torch.int64)
    tensors = problem(chosen_NK, 3)
    out_ND = way(*tensors, sort_rows(chosen_NK, 3), False)
    assert out_ND.shape == (0, WIDTH)
    assert not any(gradient.any() for gradient in torch.autograd.grad(out_ND.sum(), tensors))


@pytest.mark.parametrize("way", [megablocks.grouped, megablocks.sparse], ids=["grouped", "sparse"])
@pytest.mark.usefixtures("stand_ins")
def test_a_plan_with_no_more_rows_than_needed(way):
    chosen_NK = torch.tensor(ROUTINGS["dropped"][0])
    tensors = problem(chosen_NK, 3)
    torch.testing.assert_close(
        way(*tensors, sort_rows(chosen_NK, 3, 4), False), way(*tensors, sort_rows(chosen_NK, 3), False)
    )


@pytest.mark.parametrize("way", [megablocks.grouped, megablocks.sparse], ids=["grouped", "sparse"])
@pytest.mark.usefixtures("stand_ins")
def test_recomputing_keeps_less(way):
    def kept_bytes(recompute_up):
        chosen_NK = torch.arange(512)[:, None] % 2
        tensors = problem(chosen_NK, 2)
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            way(*tensors, sort_rows(chosen_NK, 2), recompute_up)
        return sum(kept.values())

    pre_activations = 512 * 2 * HIDDEN * 8
    assert kept_bytes(True) <= kept_bytes(False) - pre_activations


def test_it_says_why_not():
    assert "needs an NVIDIA GPU; this runs on cpu" in megablocks.unavailable(
        "megablocks_grouped", "cpu", torch.bfloat16, 128, 128
    )
    for name, package in (("megablocks_grouped", "grouped_gemm"), ("megablocks_sparse", "stk")):
        reason = megablocks.why_not(name)
        assert reason is not None and package in reason and "pip install --no-build-isolation" in reason


@pytest.mark.usefixtures("stand_ins")
def test_it_says_what_does_not_fit(monkeypatch):
    stand_in("triton", monkeypatch)
    versions = {"triton": "3.1.0"}
    monkeypatch.setattr(megablocks, "version", versions.__getitem__)

    def reason(name, dtype=torch.bfloat16, width=256, expert_width=128):
        return megablocks.unavailable(name, "cuda", dtype, width, expert_width)

    assert reason("megablocks_grouped") is None and reason("megablocks_sparse") is None
    assert reason("megablocks_grouped", width=100) is None
    assert reason("megablocks_grouped", torch.float16) == "takes bfloat16, not float16"
    assert reason("megablocks_sparse", torch.float32) == "takes bfloat16 and float16, not float32"
    assert reason("megablocks_sparse", width=100) == "needs multiples of 128, not width=100"
    for newer in ("3.2.0", "3.10.1", "4.0.0+git1"):
        versions["triton"] = newer
        assert 'use experts = "megablocks_grouped"' in reason("megablocks_sparse")
        assert reason("megablocks_grouped") is None
