"""Softmax attention block by block in plain torch: memory linear in the length, any mask, any channels."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attention.backends.strips import Block, Strip, strips
from attention.contract import Capability, Options
from attention.mask import Mask, Places

LONGEST_EDGE = {"cpu": 256, "cuda": 2048}
"""Queries, and keys, of a block at most: a processor wants scores that stay in its cache, a GPU large products."""
CELLS = {"cpu": 2**23, "cuda": 2**27}
"""Scores of a block at most, over all rows and heads."""


class Blockwise:
    """Online softmax over blocks of keys in plain torch, fp32 or fp64 throughout (Milakov and Gimelshein 2018).

    Queries meet the blocks of keys that they see and no others; only blocks on the mask's edge are masked. The backward
    pass computes each block's scores again from the log-sum-exp (Dao et al. 2022, appendix B). edge: the side of a
    block; left out, what suits the device.
    """

    name = "blockwise"
    capability = Capability(
        devices=("cpu", "cuda"), dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)
    )

    def __init__(self, edge: int | None = None) -> None:
        self.edge = edge

    def unavailable(self) -> str | None:
        return None

    def forward(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options
    ) -> tuple[Tensor, Tensor]:
        work = Work(q_BTHC, k_BSGC, v_BSGE, mask, options, self.edge)
        out_BTHE = q_BTHC.new_zeros((*q_BTHC.shape[:3], v_BSGE.shape[3]), dtype=work.answer_dtype(q_BTHC))
        lse_BTH1 = q_BTHC.new_full((*q_BTHC.shape[:3], 1), float("-inf"), dtype=work.dtype)
        for strip in work.strips:
            out, lse = _forward(work, strip)
            work.put(out_BTHE, strip.queries, out)
            work.put(lse_BTH1, strip.queries, lse)
        return out_BTHE, lse_BTH1[..., 0].transpose(1, 2)

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
        work = Work(q_BTHC, k_BSGC, v_BSGE, mask, options, self.edge)
        delta_BTH1 = torch.einsum("bthe,bthe->bth", grad_BTHE.to(work.dtype), out_BTHE.to(work.dtype))[..., None]
        if grad_lse_BHT is not None:
            delta_BTH1 = delta_BTH1 - grad_lse_BHT.transpose(1, 2)[..., None]
        # Of a query that sees nothing every weight is exp(-inf): 0, where exp(-inf + inf) would be NaN.
        lse_BTH1 = lse_BHT.masked_fill(lse_BHT == float("-inf"), float("inf")).transpose(1, 2)[..., None]
        grad_q_BTHC = torch.zeros_like(q_BTHC, dtype=work.answer_dtype(q_BTHC), memory_format=torch.contiguous_format)
        grad_k_XSC, grad_v_XSE = (x.new_zeros(work.key_shape(x), dtype=work.dtype) for x in (k_BSGC, v_BSGE))
        for strip in work.strips:
            grad, lse, delta = (work.queries(x, strip.queries) for x in (grad_BTHE, lse_BTH1, delta_BTH1))
            grad_q = _backward(work, strip, (grad, lse, delta), (grad_k_XSC, grad_v_XSE))
            work.put(grad_q_BTHC, strip.queries, grad_q)
        return grad_q_BTHC, work.as_keys(grad_k_XSC, k_BSGC), work.as_keys(grad_v_XSE, v_BSGE)


def _forward(work: "Work", strip: Strip) -> tuple[Tensor, Tensor]:
    """out (X, Y, E) and log-sum-exp (X, Y, 1) of one strip."""
    q_XYC = work.scaled_queries(strip)
    high_XY1 = q_XYC.new_full((*q_XYC.shape[:2], 1), float("-inf"))
    total_XY1 = torch.zeros_like(high_XY1)
    sum_XYE = q_XYC.new_zeros((*q_XYC.shape[:2], work.v_BSGE.shape[3]))
    for block in strip.blocks:
        scores_XYS, _ = work.scores(q_XYC, strip, block)
        before_XY1, high_XY1 = high_XY1, torch.maximum(high_XY1, scores_XYS.amax(-1, keepdim=True))
        # A finite stand-in where nothing is seen yet: -inf minus -inf would be NaN.
        finite_XY1 = high_XY1.masked_fill(high_XY1 == float("-inf"), 0.0)
        weights_XYS = scores_XYS.sub_(finite_XY1).exp_()
        shrink_XY1 = before_XY1.sub_(finite_XY1).exp_()
        total_XY1 = total_XY1.mul_(shrink_XY1).add_(weights_XYS.sum(-1, keepdim=True))
        sum_XYE = sum_XYE.mul_(shrink_XY1).baddbmm_(weights_XYS, work.keys(work.v_BSGE, block.keys))
    lse_XY1 = high_XY1 + total_XY1.log()
    return sum_XYE.div_(total_XY1.masked_fill(total_XY1 == 0, 1.0)), lse_XY1


def _backward(work: "Work", strip: Strip, given: tuple[Tensor, Tensor, Tensor], grown: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of the strip's queries (X, Y, C); those of the keys and values are added to `grown`."""
    grad_XYE, lse_XY1, delta_XY1 = given
    grad_k_XSC, grad_v_XSE = grown
    q_XYC = work.scaled_queries(strip)
    grad_q_XYC = torch.zeros_like(q_XYC)
    for block in strip.blocks:
        scores_XYS, slope_XYS = work.scores(q_XYC, strip, block, with_slope=True)
        weights_XYS = scores_XYS.sub_(lse_XY1).exp_()
        grad_v_XSE[:, block.keys].baddbmm_(weights_XYS.mT, grad_XYE)
        grad_scores_XYS = torch.bmm(grad_XYE, work.keys(work.v_BSGE, block.keys).mT).sub_(delta_XY1).mul_(weights_XYS)
        if slope_XYS is not None:
            grad_scores_XYS.mul_(slope_XYS)
        grad_q_XYC.baddbmm_(grad_scores_XYS, work.keys(work.k_BSGC, block.keys))
        grad_k_XSC[:, block.keys].baddbmm_(grad_scores_XYS.mT, q_XYC)
    return grad_q_XYC.mul_(work.scale)


@dataclass
class Work:
    """One call's tensors, cut into blocks in which one product serves all: X = rows times key heads, and with Y rows
    each that are a strip's queries of all query heads which read that key head. Documents lie in one flat row."""

    q_BTHC: Tensor
    k_BSGC: Tensor
    v_BSGE: Tensor
    mask: Mask
    options: Options
    edge: int | None

    def __post_init__(self) -> None:
        self.shape = (*self.q_BTHC.shape[:2], self.k_BSGC.shape[1])
        self.mask.check(*self.shape)
        self.num_rows = 1 if self.mask.documents is not None else self.shape[0]
        self.num_key_heads = self.k_BSGC.shape[2]
        self.dtype = torch.promote_types(self.q_BTHC.dtype, torch.float32)
        self.scale = self.options.scale_for(self.q_BTHC.shape[3])

    @cached_property
    def strips(self) -> tuple[Strip, ...]:
        (B, T, S), H, device = self.shape, self.q_BTHC.shape[2], self.q_BTHC.device.type
        edge = self.edge
        if edge is None:
            fitting = math.isqrt(CELLS.get(device, CELLS["cpu"]) // max(1, self.num_rows * H)) // 64 * 64
            edge = max(64, min(LONGEST_EDGE.get(device, LONGEST_EDGE["cpu"]), fitting))
        flat = B // self.num_rows if self.num_rows else 1
        return strips(flat * T, flat * S, self.mask, edge)

    @cached_property
    def places(self) -> tuple[Places, Places]:
        """Where queries and keys stand, (rows, T) and (rows, S): one row where all are masked alike."""
        B, T, S = self.shape
        found = self.mask.places(B, T, S, self.q_BTHC.device)
        if self.mask.documents is not None:
            queries, keys = (Places(*(x.flatten()[None] for x in places)) for places in found)
        elif isinstance(self.mask.prefix, tuple):
            queries, keys = found
        else:
            queries, keys = (Places(*(x[:1] for x in places)) for places in found)
        return queries, keys

    @property
    def shared(self) -> int:
        """How many query heads share a key head."""
        return self.q_BTHC.shape[2] // self.num_key_heads

    def scaled_queries(self, strip: Strip) -> Tensor:
        return self.queries(self.q_BTHC, strip.queries) * self.scale

    def scores(
        self, q_XYC: Tensor, strip: Strip, block: Block, *, with_slope: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(scores (X, Y, S), -inf where nothing is seen; their slope in q k^T where a cap bends them)."""
        scores_XYS = torch.bmm(q_XYC, self.keys(self.k_BSGC, block.keys).mT)
        slope_XYS, cap = None, self.options.softcap
        if cap:
            scores_XYS.div_(cap).tanh_()
            slope_XYS = 1 - scores_XYS.square() if with_slope else None
            scores_XYS.mul_(cap)
        if not block.is_full:
            queries, keys = self.places
            seen_BTS = self.mask.sees(
                Places(*(x[:, strip.queries, None] for x in queries)), Places(*(x[:, None, block.keys] for x in keys))
            )
            heads = (self.num_rows, self.num_key_heads, self.shared, *seen_BTS.shape[1:])
            scores_XYS.view(heads).masked_fill_(~seen_BTS[:, None, None], float("-inf"))
        return scores_XYS, slope_XYS

    def queries(self, x_BTHC: Tensor, where: slice) -> Tensor:
        """Some queries, (X, Y, C), in the precision of the work."""
        x_BtHC = self._rows(x_BTHC)[:, where].to(self.dtype)
        return (
            x_BtHC.unflatten(2, (self.num_key_heads, -1))
            .permute(0, 2, 3, 1, 4)
            .reshape(self.num_rows * self.num_key_heads, self.shared * (where.stop - where.start), x_BTHC.shape[3])
        )

    def put(self, into_BTHC: Tensor, where: slice, x_XYC: Tensor) -> None:
        """Write what `queries` would read."""
        heads = (self.num_rows, self.num_key_heads, self.shared, where.stop - where.start, x_XYC.shape[2])
        self._rows(into_BTHC)[:, where] = x_XYC.view(heads).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def keys(self, x_BSGC: Tensor, where: slice) -> Tensor:
        """Some keys or values, (X, S, C), in the precision of the work."""
        return self._rows(x_BSGC)[:, where].to(self.dtype).transpose(1, 2).flatten(0, 1)

    def key_shape(self, x_BSGC: Tensor) -> tuple[int, int, int]:
        B, S, G, C = x_BSGC.shape
        return self.num_rows * G, S if self.mask.documents is None else B * S, C

    def as_keys(self, x_XSC: Tensor, like_BSGC: Tensor) -> Tensor:
        """What was summed for keys or values, laid out and typed as an answer."""
        x_BSGC = x_XSC.unflatten(0, (self.num_rows, self.num_key_heads)).transpose(1, 2).reshape(like_BSGC.shape)
        return x_BSGC.to(self.answer_dtype(like_BSGC)).contiguous()

    def answer_dtype(self, like: Tensor) -> torch.dtype:
        return self.dtype if self.options.is_partial else like.dtype

    def _rows(self, x: Tensor) -> Tensor:
        return x if self.mask.documents is None else x.flatten(0, 1)[None]
