"""flash-attn 2, 3 and 4 and torch's copy of 2, each by the private functions that give and take the log-sum-exp.

Checked against the sources of flash-attn 2.8.3, its hopper folder of 2025-07 and of 2026, flash-attn-4 4.0.0b36 and the
schemas of torch 2.11 and 2.13. Their public functions keep the log-sum-exp of a backward pass to themselves.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from attention.backends import aten
from settings import Refusal

UNBOUNDED = -1
"""A side of a window without an end, in all libraries but flash-attn 4."""


@dataclass(frozen=True)
class Segments:
    """Documents of flat tokens: int32 starts (count + 1,), the longest of each side, and the window (`Band`)."""

    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    left: int | None
    right: int | None

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) for a library that writes -1 for None."""
        return (UNBOUNDED if self.left is None else self.left, UNBOUNDED if self.right is None else self.right)


class Library(Protocol):
    """q (N, H, C), k and v (M, G, C) of whole documents; the log-sum-exp is (H, N), fp32, natural.

    Backward takes (grad, q, k, v, out, log-sum-exp), the last two of a softmax that may be larger.

    Causality is a window of which the right side is 0: all libraries know that, and none needs to be told twice.
    """

    has_softcap: bool
    majors: range
    """Compute capabilities, their first digit, for which it is the right choice."""

    def is_there(self) -> bool: ...

    def forward(  # noqa: PLR0917 (a product has many factors)
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, tensors: tuple[Tensor, ...], segments: Segments, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@lru_cache
def found(module: str) -> ModuleType | None:
    """The module, or None: not installed, or built for another torch or CUDA, which only importing it shows."""
    try:
        return import_module(module)
    except Exception:  # of any kind: it is the library's first breath that fails
        return None


class FlashAttention2:
    """2.7 and newer. Gradients are written into given tensors; -1 is unbounded; most arguments have no default."""

    has_softcap = True
    majors = range(8, 13)
    module = "flash_attn.flash_attn_interface"

    def is_there(self) -> bool:
        # flash-attn 4 alone makes a package `flash_attn` too, without this module; before 2.7 the window was a pair.
        function = getattr(found(self.module), "_flash_attn_varlen_forward", None)
        return function is not None and "window_size_left" in _parameters(function)

    def forward(  # noqa: PLR0917
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = import_module(self.module)._flash_attn_varlen_forward(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=segments.query_starts,
            cu_seqlens_k=segments.key_starts,
            max_seqlen_q=segments.longest_query,
            max_seqlen_k=segments.longest_key,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=False,
            window_size_left=segments.window[0],
            window_size_right=segments.window[1],
            softcap=softcap,
            alibi_slopes=None,
            return_softmax=False,
        )
        return out, lse

    def backward(
        self, tensors: tuple[Tensor, ...], segments: Segments, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out, lse = tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        import_module(self.module)._flash_attn_varlen_backward(
            dout=grad,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            cu_seqlens_q=segments.query_starts,
            cu_seqlens_k=segments.key_starts,
            max_seqlen_q=segments.longest_query,
            max_seqlen_k=segments.longest_key,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=False,
            window_size_left=segments.window[0],
            window_size_right=segments.window[1],
            softcap=softcap,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


class FlashAttention3:
    """Gradients are written into given tensors; -1 is unbounded; in 2025 the window was a pair."""

    has_softcap = True
    majors = range(9, 10)
    module = "flash_attn_interface"

    def is_there(self) -> bool:
        return hasattr(found(self.module), "_flash_attn_backward")

    def forward(  # noqa: PLR0917
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        function = import_module(self.module)._flash_attn_forward
        named = {
            **{"q": q, "k": k, "v": v},
            **_segment_names(segments),
            **{"softmax_scale": scale, "causal": False, "softcap": softcap, **_window_names(function, segments)},
        }
        out, lse, *_ = function(**_filled_up(function, named))
        return out, lse

    def backward(
        self, tensors: tuple[Tensor, ...], segments: Segments, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out, lse = tensors
        function = import_module(self.module)._flash_attn_backward
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        causal = "is_causal" if "is_causal" in _parameters(function) else "causal"
        named = {
            **{"dout": grad, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv},
            **_segment_names(segments),
            **{"softmax_scale": scale, causal: False, "softcap": softcap, **_window_names(function, segments)},
            **_fixed_order(function),
        }
        function(**_filled_up(function, named))
        return dq, dk, dv


def _segment_names(segments: Segments) -> dict[str, Any]:
    return {
        "cu_seqlens_q": segments.query_starts,
        "cu_seqlens_k": segments.key_starts,
        "max_seqlen_q": segments.longest_query,
        "max_seqlen_k": segments.longest_key,
    }


def _window_names(function: Any, segments: Segments) -> dict[str, Any]:
    left, right = segments.window
    if "window_size" in _parameters(function):
        return {"window_size": (left, right)}
    return {"window_size_left": left, "window_size_right": right}


def _filled_up(function: Any, named: dict[str, Any]) -> dict[str, Any]:
    """With None for each argument that has no default: those are the parts of generation."""
    empty = {name: None for name, parameter in _parameters(function).items() if parameter.default is parameter.empty}
    return {**empty, **named}


def _fixed_order(function: Any) -> dict[str, bool]:
    """What tells a backward pass to add up in the same order every time, where torch was told to.

    Raises Refusal where the library knows no such word.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return {}
    if "deterministic" not in _parameters(function):
        raise Refusal(
            f"deterministic=true: this version of {function.__module__} adds gradients up in no fixed order; use "
            'model.attention.backend="sdpa"'
        )
    return {"deterministic": True}


def _parameters(function: Any) -> Any:
    # torch.library.custom_op wraps the function that was written.
    return signature(getattr(function, "_init_fn", function)).parameters


class FlashAttention4:
    """Gradients are returned; None is unbounded, and a -1 beside causal would answer all zeros."""

    has_softcap = True
    majors = range(9, 13)
    module = "flash_attn.cute.interface"

    def is_there(self) -> bool:
        return hasattr(found(self.module), "_flash_attn_bwd")

    def forward(  # noqa: PLR0917
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = import_module(self.module)._flash_attn_fwd(
            q,
            k,
            v,
            **_segment_names(segments),
            softmax_scale=scale,
            softcap=softcap,
            window_size_left=segments.left,
            window_size_right=segments.right,
            return_lse=True,
        )
        return out, lse

    def backward(
        self, tensors: tuple[Tensor, ...], segments: Segments, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out, lse = tensors
        function = import_module(self.module)._flash_attn_bwd
        dq, dk, dv = function(
            q,
            k,
            v,
            out,
            grad,
            lse,
            **_segment_names(segments),
            softmax_scale=scale,
            softcap=softcap,
            window_size_left=segments.left,
            window_size_right=segments.right,
            **_fixed_order(function),
        )
        return dq, dk, dv


class TorchFlash:
    """The copy of flash-attn 2 in torch: no softcap."""

    has_softcap = False
    majors = range(8, 13)

    def is_there(self) -> bool:
        return torch.backends.cuda.is_flash_attention_available()

    def forward(  # noqa: PLR0917
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        assert not softcap
        out, lse, *_ = aten.ops._flash_attention_forward(
            *(q, k, v, segments.query_starts, segments.key_starts, segments.longest_query, segments.longest_key),
            *(0.0, False, False),
            scale=scale,
            window_size_left=segments.window[0],
            window_size_right=segments.window[1],
        )
        return out, lse

    def backward(
        self, tensors: tuple[Tensor, ...], segments: Segments, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out, lse = tensors
        assert not softcap
        return aten.ops._flash_attention_backward(
            *(grad, q, k, v, out, lse),
            *(segments.query_starts, segments.key_starts, segments.longest_query, segments.longest_key),
            *(0.0, False, *aten.no_dropout(q)),
            scale=scale,
            window_size_left=segments.window[0],
            window_size_right=segments.window[1],
        )


# In the order in which they are looked for.
LIBRARIES: tuple[Library, ...] = (FlashAttention3(), FlashAttention4(), FlashAttention2(), TorchFlash())
