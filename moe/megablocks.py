"""MegaBlocks as a way to multiply: its grouped matmuls, and its block-sparse ones (Gale et al. 2022, section 5).

Here to be compared with. Both wait for the device in every layer, because both libraries want the experts' sizes on the
host. Written for grouped_gemm 0.3, megablocks 0.10 and stanford-stk 0.7.1, none of which is needed by anything else.
"""

# ruff: noqa: PLR0917 (every way to multiply has the signature of ExpertMatmul)

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.dispatch import Plan

BLOCK = 128
"""Side of stk's blocks: experts are padded to whole ones."""

PACKAGES = {
    "megablocks_grouped": (("grouped_gemm",), "pip install --no-build-isolation grouped_gemm==0.3.0"),
    "megablocks_sparse": (
        ("megablocks", "megablocks_ops", "stk", "triton"),
        "pip install --no-build-isolation --no-deps megablocks==0.10.0 stanford-stk==0.7.1",
    ),
}
DTYPES = {"megablocks_grouped": (torch.bfloat16,), "megablocks_sparse": (torch.bfloat16, torch.float16)}


def why_not(name: str) -> str | None:
    """Why this machine's packages do not allow it, or None where they do."""
    modules, install = PACKAGES[name]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        return f"needs {', '.join(missing)}, not installed; with a CUDA compiler: {install}"
    if name == "megablocks_sparse" and _minor_version("triton") >= (3, 2):
        return (
            f"stk's 16-bit indices overflow from triton 3.2 on, and this is {version('triton')};"
            ' use experts = "megablocks_grouped"'
        )
    return None


def unavailable(name: str, device: str, dtype: torch.dtype, width: int, expert_width: int) -> str | None:
    """Why such experts cannot be computed so, or None where they can."""
    if device != "cuda":
        return f"needs an NVIDIA GPU; this runs on {device}"
    reason = why_not(name)
    if reason is not None:
        return reason
    if dtype not in DTYPES[name]:
        takes = " and ".join(_short(taken) for taken in DTYPES[name])
        return f"takes {takes}, not {_short(dtype)}"
    odd = {n: size for n, size in (("width", width), ("expert_width", expert_width)) if size % BLOCK}
    if name == "megablocks_sparse" and odd:
        return f"needs multiples of {BLOCK}, not " + " and ".join(f"{n}={size}" for n, size in odd.items())
    return None


def grouped(x_ND: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor, plan: Plan, recompute_up: bool) -> Tensor:
    """The experts over grouped_gemm's products: (N, D)."""
    from grouped_gemm.ops import gmm

    ends_E = plan.offsets_E.cpu().long()
    sizes_E, num_rows = ends_E.diff(prepend=ends_E.new_zeros(1)), int(ends_E[-1])
    tokens_R, order_R = plan.tokens_R[:num_rows], plan.order_R[:num_rows]

    def hidden(x_RD: Tensor, gate_up: Tensor) -> Tensor:
        gate, up = gmm(x_RD, gate_up, sizes_E, trans_b=True).chunk(2, dim=1)
        return F.silu(gate) * up

    # The operands are cast already, and gates stay in fp32.
    with torch.autocast(x_ND.device.type, enabled=False):
        h_RF = _kept(hidden, recompute_up, x_ND.index_select(0, tokens_R), gate_up.contiguous())
        y_RD = gmm(h_RF, down.contiguous(), sizes_E, trans_b=True)
        weighted_RD = y_RD * gates_NK.flatten()[order_R, None]
        out_ND = weighted_RD.new_zeros(x_ND.shape).index_add(0, tokens_R, weighted_RD)
    return out_ND.to(x_ND.dtype)


def sparse(x_ND: Tensor, gates_NK: Tensor, gate_up: Tensor, down: Tensor, plan: Plan, recompute_up: bool) -> Tensor:
    """The experts as one block-sparse matrix over stk's products: (N, D)."""
    import stk
    from megablocks import ops

    if not len(x_ND):
        # Empty, but joined to every input, so that their gradients are zeros and not missing.
        return x_ND * (gates_NK.sum() + gate_up.sum() + down.sum()).to(x_ND.dtype)
    num_experts, width, expert_width = down.shape
    goes_NK = plan.places_NK < plan.offsets_E[-1]
    # MegaBlocks knows no slot that goes nowhere: such slots join the last expert's rows, with gates of 0.
    order_R = plan.places_NK.flatten().argsort(stable=True)
    gates_R = gates_NK.where(goes_NK, 0).flatten()
    ends_E = plan.offsets_E.clone()
    ends_E[-1] = len(order_R)
    experts_R = torch.searchsorted(ends_E, torch.arange(len(order_R), device=ends_E.device), right=True).int()
    sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    padded_E = ((sizes_E + BLOCK - 1) // BLOCK * BLOCK).cumsum(0).int()
    routing = (order_R.int(), experts_R)

    def hidden(x_RD: Tensor, gate_up: Tensor) -> Tensor:
        gate, up = (half.reshape(-1, width).t() for half in gate_up.chunk(2, dim=1))
        return F.silu(stk.ops.sdd(x_RD, gate, topology).data) * stk.ops.sdd(x_RD, up, topology).data

    with torch.autocast(x_ND.device.type, enabled=False):
        slots = gates_NK.shape[1]
        x_RD = ops.padded_gather(x_ND, *routing, ends_E, padded_E, slots)
        topology = _topology(len(x_RD), padded_E, expert_width, x_ND.dtype)
        h = _with_data(topology, _kept(hidden, recompute_up, x_RD, gate_up))
        y_RD = stk.ops.dsd(h, down.transpose(1, 2).reshape(num_experts * expert_width, width))
        return ops.padded_scatter(y_RD, *routing, gates_R, ends_E, padded_E, slots)


def _topology(num_rows: int, padded_E: Tensor, expert_width: int, dtype: torch.dtype) -> Any:
    """An stk.Matrix (rows, E * F) without data: each block of rows meets the columns of its own expert."""
    import stk
    from megablocks import ops

    device, shape = padded_E.device, (num_rows, len(padded_E) * expert_width)
    block_rows, blocks_a_row = num_rows // BLOCK, expert_width // BLOCK
    starts = torch.arange(0, block_rows * blocks_a_row + 1, blocks_a_row, dtype=torch.int32, device=device)
    columns = ops.topology(padded_E, BLOCK, block_rows, blocks_a_row)
    # stk asks for the data's shape and dtype alone.
    data = torch.empty(len(columns), BLOCK, BLOCK, dtype=dtype, device="meta")
    rows = stk.ops.row_indices(shape, data, starts, columns)
    sorted_columns, by_column = columns.int().sort(stable=True)
    all_columns = torch.arange(shape[1] // BLOCK, device=device, dtype=torch.int32)
    starts_t = F.pad(torch.searchsorted(sorted_columns, all_columns, right=True, out_int32=True), (1, 0))
    return stk.Matrix(shape, data, rows, columns, starts, rows[by_column], starts_t, by_column.int())


def _with_data(topology: Any, data: Tensor) -> Any:
    """The same blocks with other contents."""
    import stk

    return stk.Matrix(
        topology.size(),
        data,
        topology.row_indices,
        topology.column_indices,
        topology.offsets,
        topology.column_indices_t,
        topology.offsets_t,
        topology.block_offsets_t,
    )


def _kept(function: Callable[..., Tensor], recompute: bool, *tensors: Tensor) -> Tensor:
    """function(*tensors), keeping what its backward pass needs, or else only the tensors."""
    if not recompute:
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def _minor_version(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
