"""What stands around every fused kernel: precision, widths of heads, the gradient of the log-sum-exp."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.contract import Options


@dataclass(frozen=True)
class Widths:
    """Which widths of heads a kernel takes. Others are filled up with zeros, which change no score and no sum."""

    are_equal: bool = False
    """Values must be as wide as keys."""
    multiple: int = 1

    def fit(self, channels: int, value_channels: int) -> tuple[int, int]:
        """The least widths, of keys and of values, that hold both."""
        C, E = (-(-width // self.multiple) * self.multiple for width in (channels, value_channels))
        return (max(C, E), max(C, E)) if self.are_equal else (C, E)


def forward(  # noqa: PLR0917 (a product has many factors)
    inner: Callable[..., tuple[Tensor, Tensor]],
    widths: Widths,
    q_BTHC: Tensor,
    k_BSGC: Tensor,
    v_BSGE: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """As in `attention.contract.Backend`, by `inner(q, k, v, scale)`, which gets tensors that it can take."""
    scale, E = options.scale_for(q_BTHC.shape[-1]), v_BSGE.shape[-1]
    C_fit, E_fit = widths.fit(q_BTHC.shape[-1], E)
    dtype = working_dtype(q_BTHC, options)
    q, k, v = widen(q_BTHC, C_fit, dtype), widen(k_BSGC, C_fit, dtype), widen(v_BSGE, E_fit, dtype)
    out_BTHE, lse_BHT = inner(q, k, v, scale=scale)
    return out_BTHE[..., :E].to(answer_dtype(q_BTHC, options)), lse_BHT


def backward(  # noqa: PLR0917
    inner: Callable[..., tuple[Tensor, Tensor, Tensor]],
    widths: Widths,
    grad_BTHE: Tensor,
    q_BTHC: Tensor,
    k_BSGC: Tensor,
    v_BSGE: Tensor,
    out_BTHE: Tensor,
    lse_BHT: Tensor,
    options: Options,
    grad_lse_BHT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As in `attention.contract.Backend`, by `inner(grad, q, k, v, out, lse, scale)`."""
    C, E = q_BTHC.shape[-1], v_BSGE.shape[-1]
    dtype = working_dtype(q_BTHC, options)
    if grad_lse_BHT is not None:
        # A kernel takes sum(grad * out) from each weight's gradient, where sum(grad * out) - grad_lse is wanted: one
        # more channel of grad 1, out -grad_lse and value 0 makes it so, and touches nothing else.
        grad_BTHE = torch.cat((grad_BTHE, torch.ones_like(grad_BTHE[..., :1])), dim=-1)
        out_BTHE = torch.cat((out_BTHE, -grad_lse_BHT.transpose(1, 2)[..., None].to(out_BTHE.dtype)), dim=-1)
    C_fit, E_fit = widths.fit(C, grad_BTHE.shape[-1])
    q, k, v = widen(q_BTHC, C_fit, dtype), widen(k_BSGC, C_fit, dtype), widen(v_BSGE, E_fit, dtype)
    grad, out = widen(grad_BTHE, E_fit, dtype), widen(out_BTHE, E_fit, dtype)
    dq, dk, dv = inner(grad, q, k, v, out, lse_BHT, scale=options.scale_for(C))
    answer = answer_dtype(q_BTHC, options)
    return dq[..., :C].to(answer), dk[..., :C].to(answer), dv[..., :E].to(answer)


def answer_dtype(q_BTHC: Tensor, options: Options) -> torch.dtype:
    """Parts of a larger answer are added up by the caller, and rounded once, when they are all there."""
    return torch.promote_types(q_BTHC.dtype, torch.float32) if options.is_partial else q_BTHC.dtype


def working_dtype(q_BTHC: Tensor, options: Options) -> torch.dtype:
    """Kernels answer in the precision that they are given, so fp32 answers cost fp32 inputs."""
    if options.is_partial or (q_BTHC.is_cpu and not has_units(q_BTHC.dtype)):
        return torch.promote_types(q_BTHC.dtype, torch.float32)
    return q_BTHC.dtype


@lru_cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies `dtype` itself; where it does not, kernels take far longer than in fp32."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype != torch.float16 or torch.cpu._is_amx_fp16_supported()


def widen(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The same numbers in `dtype`, with zeros behind them up to `width`."""
    return F.pad(x.to(dtype), (0, width - x.shape[-1])) if x.shape[-1] < width else x.to(dtype)
