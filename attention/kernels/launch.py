"""From tensors and work to launches of the kernels: layouts, tables, flags and tiles. Nothing here waits for a GPU."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attention.contract import Options
from attention.kernels.backward import delta_kernel, key_gradients_kernel, query_gradients_kernel
from attention.kernels.blocks import Rows, Work, table_of
from attention.kernels.forward import forward_kernel
from attention.kernels.tiles import Kind, Tile, choose, padded
from attention.mask import Mask

LOG2E = math.log2(math.e)
Tiles = Mapping[Kind, Tile]
KERNELS: dict[Kind, Any] = {
    "forward": forward_kernel,
    "key_gradients": key_gradients_kernel,
    "query_gradients": query_gradients_kernel,
}


def forward(  # noqa: PLR0917 (as in the contract)
    q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, E) in q's dtype, or fp32 if partial; log-sum-exp (B, H, T) fp32); `tiles` in place of our own."""
    (B, T, H), E = q_BTHC.shape[:3], v_BSGE.shape[-1]
    call = Call.of(q_BTHC, k_BSGC, v_BSGE, options, tiles)
    out_NHE, lse_NH = call.forward(Rows(mask, (B, T, k_BSGC.shape[1])), B * T)
    return out_NHE.view(B, T, H, E), lse_NH.view(B, T, H).transpose(1, 2)


def backward(  # noqa: PLR0917 (as in the contract)
    grad_BTHE: Tensor,
    q_BTHC: Tensor,
    k_BSGC: Tensor,
    v_BSGE: Tensor,
    out_BTHE: Tensor,
    lse_BHT: Tensor,
    mask: Mask,
    options: Options,
    grad_lse_BHT: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtypes, or fp32 if partial; `tiles` in place of our own."""
    (B, T), S = q_BTHC.shape[:2], k_BSGC.shape[1]
    call = Call.of(q_BTHC, k_BSGC, v_BSGE, options, tiles)
    answers = Answers.of(grad_BTHE.to(q_BTHC.dtype), out_BTHE, lse_BHT, grad_lse_BHT, k_BSGC.shape[2])
    grad_q, grad_k, grad_v = call.backward(Rows(mask, (B, T, S)), answers, B * T, B * S)
    return grad_q.view(q_BTHC.shape), grad_k.view(k_BSGC.shape), grad_v.view(v_BSGE.shape)


@dataclass(frozen=True)
class Answers:
    """What the gradients are made from beside queries, keys and values."""

    grad_NHE: Tensor
    delta: Tensor
    """sum(grad * out) - grad_lse, (G, tokens * H / G) fp32."""
    exponent: Tensor
    """The log-sum-exp as an exponent of 2, (G, tokens * H / G) fp32."""

    @classmethod
    def of(
        cls,
        grad_BTHE: Tensor,
        out_BTHE: Tensor,
        lse_BHT: Tensor,
        grad_lse_BHT: Tensor | None,
        num_key_heads: int,
    ) -> "Answers":
        grad_NHE, out_NHE = flat(grad_BTHE), flat(out_BTHE)
        lse_NH = lse_BHT.transpose(1, 2).flatten(0, 1)
        grad_lse_NH = lse_NH if grad_lse_BHT is None else grad_lse_BHT.transpose(1, 2).flatten(0, 1)
        (N, H, E), G = grad_NHE.shape, num_key_heads
        num_rows = N * H // G
        delta, exponent = torch.empty(2, G, num_rows, dtype=torch.float32, device=grad_NHE.device)
        rows = max(16, 4096 // padded(E))
        if num_rows:
            delta_kernel[(triton.cdiv(num_rows, rows), G)](
                grad_ptr=grad_NHE,
                out_ptr=out_NHE,
                lse_ptr=lse_NH,
                grad_lse_ptr=grad_lse_NH,
                delta_ptr=delta,
                exponent_ptr=exponent,
                num_rows=num_rows,
                **_strides("grad", grad_NHE),
                **_strides("out", out_NHE),
                **_strides("lse", lse_NH),
                **_strides("grad_lse", grad_lse_NH),
                R=H // G,
                E=E,
                HAS_GRAD_LSE=grad_lse_BHT is not None,
                BLOCK_E=padded(E),
                ROWS=rows,
            )
        return cls(grad_NHE, delta, exponent)

    def arguments(self) -> dict[str, Any]:
        """Of the kernels of gradients."""
        given = {"grad_ptr": self.grad_NHE, "delta_ptr": self.delta, "exponent_ptr": self.exponent}
        return {**given, "num_rows": self.delta.shape[1], **_strides("grad", self.grad_NHE)}


@dataclass(frozen=True)
class Call:
    """Queries, keys and values as flat tokens: what all kernels are given, whatever the work."""

    q_NHC: Tensor
    k_NGC: Tensor
    v_NGE: Tensor
    options: Options
    tiles: Tiles | None

    @classmethod
    def of(cls, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, options: Options, tiles: Tiles | None = None) -> "Call":
        return cls(flat(q_BTHC), flat(k_BSGC), flat(v_BSGE), options, tiles)

    def forward(self, work: Work, num_queries: int) -> tuple[Tensor, Tensor]:
        """(out (queries, H, E), log-sum-exp (queries, H)) of all the work's queries."""
        H, E = self.q_NHC.shape[1], self.v_NGE.shape[2]
        out_NHE = self._empty(self.q_NHC, num_queries, H, E)
        # Tokens first: the rows of a block stand side by side in it.
        lse_NH = self.q_NHC.new_empty(num_queries, H, dtype=torch.float32)
        self.launch("forward", work, out_ptr=out_NHE, lse_ptr=lse_NH)
        return out_NHE, lse_NH

    def backward(self, work: Work, answers: Answers, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of all the work's queries (queries, H, C), keys (keys, G, C) and values (keys, G, E)."""
        grad_q = self._empty(self.q_NHC, num_queries, *self.q_NHC.shape[1:])
        grad_k, grad_v = (self._empty(x, num_keys, *x.shape[1:]) for x in (self.k_NGC, self.v_NGE))
        given = {**answers.arguments(), "scale": self.options.scale_for(self.q_NHC.shape[2])}
        self.launch("key_gradients", work, grad_k_ptr=grad_k, grad_v_ptr=grad_v, **given)
        self.launch("query_gradients", work, grad_q_ptr=grad_q, **given)
        return grad_q, grad_k, grad_v

    def _empty(self, like: Tensor, *sizes: int) -> Tensor:
        return like.new_empty(sizes, dtype=torch.float32 if self.options.is_partial else None)

    def launch(self, kind: Kind, work: Work, **given: Any) -> None:
        """One program of the kernel for each block of the table and key head."""
        (_, H, C), (_, G, E) = self.q_NHC.shape, self.v_NGE.shape
        has_softcap = self.options.softcap > 0
        tile = self.tiles[kind] if self.tiles else choose(kind, self.q_NHC.dtype, C, E, has_softcap=has_softcap)
        side = "key" if kind == "key_gradients" else "query"
        table = table_of(work, side, H // G, (tile.rows, tile.keys), self.q_NHC.device)
        if table.shape[1]:
            KERNELS[kind][(table.shape[1] * G,)](
                q_ptr=self.q_NHC,
                k_ptr=self.k_NGC,
                v_ptr=self.v_NGE,
                table_ptr=table,
                num_blocks=table.shape[1],
                **_strides("q", self.q_NHC),
                **_strides("k", self.k_NGC),
                **_strides("v", self.v_NGE),
                **self._numbers(work.mask),
                **given,
                **self._constants(work.mask),
                ROWS=tile.rows,
                KEYS=tile.keys,
                PRECISION=tile.precision,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )

    def _numbers(self, mask: Mask) -> dict[str, float]:
        scale, softcap = self.options.scale_for(self.q_NHC.shape[2]), self.options.softcap
        return {
            "window": mask.window or 0,
            "first_tokens": mask.first_tokens,
            "factor": (softcap or scale) * LOG2E,
            "softcap": scale / softcap if softcap else 0.0,
        }

    def _constants(self, mask: Mask) -> dict[str, Any]:
        """What the kernels are compiled for, besides their tiles."""
        (_, H, C), (_, G, E) = self.q_NHC.shape, self.v_NGE.shape
        has_window = mask.window is not None
        return {
            "G": G,
            "R": H // G,
            "C": C,
            "E": E,
            "CAUSAL": mask.is_causal,
            "WINDOW": has_window,
            "HEAD": any(mask.prefixes) or (has_window and mask.first_tokens > 0),
            "SOFTCAP": self.options.softcap > 0,
            "BLOCK_C": padded(C),
            "BLOCK_E": padded(E),
        }


def flat(x_BTHC: Tensor) -> Tensor:
    """All tokens in one dimension and channels side by side; a copy only where that cannot be had by strides."""
    x_NHC = x_BTHC.flatten(0, 1)
    return x_NHC if x_NHC.stride(2) == 1 else x_NHC.contiguous()


def _strides(name: str, x_NH: Tensor) -> dict[str, int]:
    return {f"{name}_token": x_NH.stride(0), f"{name}_head": x_NH.stride(1)}
