"""Who takes part in benchmarks.attention: our backends, and the functions that other people would call instead."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention.contract import Needs, Options
from attention.core import BACKENDS, choose, why_not
from attention.mask import Documents, Mask
from settings import Refusal

MEAN_DOCUMENT = 2048
WINDOW = 1024
PLAIN = Options()


@dataclass(frozen=True)
class Heads:
    """One layer's heads."""

    queries: int
    keys: int
    channels: int


HEADS = {"cuda": Heads(64, 8, 128), "cpu": Heads(8, 2, 64)}
"""On a GPU those of MagiAttention's benchmark (64 query heads, 8 key heads, 128 channels)."""
MASKS = ("full", "causal", "documents", "window")


def make_mask(name: str, length: int) -> Mask:
    """The mask called `name` over one row of `length` tokens."""
    masks = {
        "full": lambda: Mask(is_causal=False),
        "causal": Mask,
        "documents": lambda: Mask(documents=make_documents(length)),
        "window": lambda: Mask(window=WINDOW),
    }
    return masks[name]()


def make_documents(length: int, count: int | None = None) -> Documents:
    """Log-normal lengths (sigma 1) that fill `length` tokens, of about 2K on average, or so many; always the same."""
    count = count or max(2, length // MEAN_DOCUMENT)
    weights = np.random.default_rng(0).lognormal(size=count)
    borders = np.unique(np.round(np.cumsum(weights)[:-1] / weights.sum() * length).astype(int))
    edges = np.unique([0, *borders.tolist(), length])
    return Documents(tuple(np.diff(edges).tolist()))


def area_of(mask: Mask, length: int) -> int:
    """How many (query, key) pairs a row's mask lets through."""
    if not mask.is_causal:
        return length**2
    lengths = (length,) if mask.documents is None else mask.documents.lengths
    window = mask.window or length
    return sum(n * (n + 1) // 2 - max(n - window, 0) * (max(n - window, 0) + 1) // 2 for n in lengths)


@dataclass(frozen=True)
class Problem:
    """One row of random tokens under a mask; `flops` are those of a forward pass."""

    mask_name: str
    length: int
    heads: Heads
    mask: Mask
    q_1TGC: Tensor
    k_1SGC: Tensor
    v_1SGC: Tensor
    grad_1THC: Tensor

    @classmethod
    def make(cls, mask_name: str, length: int, heads: Heads, dtype: torch.dtype, device: str) -> "Problem":
        torch.manual_seed(0)
        q, k, v, grad = (
            torch.randn(1, length, count, heads.channels, device=device, dtype=dtype)
            for count in (heads.queries, heads.keys, heads.keys, heads.queries)
        )
        return cls(mask_name, length, heads, make_mask(mask_name, length), q, k, v, grad)

    @property
    def is_cuda(self) -> bool:
        return self.q_1TGC.is_cuda

    @cached_property
    def flops(self) -> int:
        return 4 * area_of(self.mask, self.length) * self.heads.queries * self.heads.channels

    @cached_property
    def needs(self) -> Needs:
        return Needs.of(self.q_1TGC, self.k_1SGC, self.v_1SGC, self.mask, training=True)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the documents."""
        return (self.length,) if self.mask.documents is None else self.mask.documents.lengths

    def starts(self) -> Tensor:
        return Documents(self.lengths).cu_seqlens(self.q_1TGC.device)


class Entrant(Protocol):
    """Attention to a problem. Backward follows forward, as often as asked, and returns the gradients of q, k and v."""

    def forward(self) -> Tensor: ...

    def backward(self) -> tuple[Tensor, ...]: ...


class Ours:
    """One of our backends."""

    def __init__(self, name: str, problem: Problem) -> None:
        reasons = why_not(BACKENDS[name], problem.needs)
        if reasons:
            raise Refusal("; ".join(reasons))
        self.backend, self.problem = BACKENDS[name], problem
        self.out = self.lse = torch.empty(0)

    def forward(self) -> Tensor:
        p = self.problem
        self.out, self.lse = self.backend.forward(p.q_1TGC, p.k_1SGC, p.v_1SGC, p.mask, PLAIN)
        return self.out

    def backward(self) -> tuple[Tensor, ...]:
        p = self.problem
        return self.backend.backward(p.grad_1THC, p.q_1TGC, p.k_1SGC, p.v_1SGC, self.out, self.lse, p.mask, PLAIN)


class Theirs:
    """Somebody's function of q, k and v, laid out as theirs, with autograd; `lay` brings (1, N, H, C) into that layout
    and is not timed."""

    def __init__(self, problem: Problem, attend: Callable[..., Tensor], lay: Callable[[Tensor], Tensor]) -> None:
        self.lay, self.attend = lay, attend
        tensors = (problem.q_1TGC, problem.k_1SGC, problem.v_1SGC)
        self.tensors = [lay(x).detach().clone().requires_grad_() for x in tensors]
        self.grad = lay(problem.grad_1THC).contiguous()
        self.out = torch.empty(0)

    def forward(self) -> Tensor:
        self.out = self.attend(*self.tensors)
        return self.back(self.out.detach())

    def backward(self) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(self.out, self.tensors, self.grad, retain_graph=True)
        return tuple(map(self.back, gradients))

    def back(self, x: Tensor) -> Tensor:
        """To (1, N, H, C): a view, whichever way they lay it out."""
        if x.ndim == 3:
            return x[None]
        return x.transpose(1, 2) if self.lay is by_heads else x


def by_heads(x_1NHC: Tensor) -> Tensor:
    return x_1NHC.transpose(1, 2)


def as_it_is(x_1NHC: Tensor) -> Tensor:
    return x_1NHC


def packed(x_1NHC: Tensor) -> Tensor:
    return x_1NHC[0]


def sdpa(problem: Problem, kernel: SDPBackend | None) -> Theirs:
    """torch's function with one of its kernels, or with its own choice; windows and documents only as a drawn mask."""
    mask = problem.mask
    is_plain = mask.documents is None and mask.window is None
    if not is_plain and (kernel is not None or problem.length > 4096):
        raise Refusal("knows documents and windows only as a drawn mask, which has the square of the length in cells")
    drawn = None if is_plain else mask.dense(1, problem.length, problem.length, problem.q_1TGC.device)[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            is_causal = is_plain and mask.is_causal
            return F.scaled_dot_product_attention(q, k, v, attn_mask=drawn, is_causal=is_causal, enable_gqa=True)

    return Theirs(problem, attend, by_heads)


def flex(problem: Problem) -> Theirs:
    """torch's compiled flex_attention; making its block mask is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask

    if not problem.is_cuda:
        raise Refusal("has no backward pass on CPUs")
    mask, length, device = problem.mask, problem.length, problem.q_1TGC.device
    document_N = torch.arange(len(problem.lengths), device=device).repeat_interleave(
        torch.tensor(problem.lengths, device=device)
    )
    window = mask.window or length

    def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query - key < window)
        return seen if mask.documents is None else seen & (document_N[query] == document_N[key])

    block_mask = create_block_mask(sees, None, None, length, length, device, _compile=True) if mask.is_causal else None
    compiled = compiled_flex()
    return Theirs(problem, lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True), by_heads)


@lru_cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def varlen(problem: Problem) -> Theirs:
    """torch's varlen_attn, FlashAttention-2 within torch."""
    from torch.nn.attention.varlen import varlen_attn

    if not problem.is_cuda:
        raise Refusal("has no kernel for CPUs")
    starts, longest, mask = problem.starts(), max(problem.lengths), problem.mask
    window = (-1, -1) if not mask.is_causal else (-1 if mask.window is None else mask.window - 1, 0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return first(varlen_attn(q, k, v, starts, starts, longest, longest, window_size=window, enable_gqa=True))

    return Theirs(problem, attend, packed)


def flash_library(module: str, problem: Problem) -> Theirs:
    """flash-attn 2 (flash_attn), 3 (flash_attn_interface) or 4 (flash_attn.cute), by their public functions."""
    library = import_module(module)
    mask, is_fourth = problem.mask, module == "flash_attn.cute"
    unbounded = None if is_fourth else -1
    given: dict[str, Any] = {"causal": mask.is_causal}
    if mask.window is not None:
        given["window_size"] = (mask.window - 1, unbounded if is_fourth else 0)
    if mask.documents is None:
        return Theirs(problem, lambda *qkv: first(library.flash_attn_func(*qkv, **given)), as_it_is)
    starts, longest = problem.starts(), max(problem.lengths)
    given |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return Theirs(problem, lambda *qkv: first(library.flash_attn_varlen_func(*qkv, **given)), packed)


def xformers(problem: Problem) -> Theirs:
    """xformers' memory_efficient_attention; key heads are repeated by a view, as its documentation says."""
    from xformers.ops import fmha

    masks = fmha.attn_bias
    bias: Any = None
    if problem.mask.is_causal:
        bias = masks.BlockDiagonalCausalMask.from_seqlens(list(problem.lengths))
        bias = bias if problem.mask.window is None else bias.make_local_attention(problem.mask.window)
    repeats = problem.heads.queries // problem.heads.keys

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q5 = q.unflatten(2, (-1, repeats))
        k5, v5 = (x.unsqueeze(3).expand(*q5.shape) for x in (k, v))
        return fmha.memory_efficient_attention(q5, k5, v5, attn_bias=bias).flatten(2, 3)

    return Theirs(problem, attend, as_it_is)


def first(answer: Any) -> Tensor:
    return answer[0] if isinstance(answer, tuple) else answer


THEIRS: dict[str, Callable[[Problem], Entrant]] = {
    "SDPA": lambda problem: sdpa(problem, None),
    "SDPA, flash": lambda problem: sdpa(problem, SDPBackend.FLASH_ATTENTION),
    "SDPA, cuDNN": lambda problem: sdpa(problem, SDPBackend.CUDNN_ATTENTION),
    "varlen_attn": varlen,
    "flex, compiled": flex,
    "flash-attn 2": lambda problem: flash_library("flash_attn", problem),
    "flash-attn 3": lambda problem: flash_library("flash_attn_interface", problem),
    "flash-attn 4": lambda problem: flash_library("flash_attn.cute", problem),
    "xformers": xformers,
}
SLOW = {"reference", "blockwise"}
"""Ours that are there for other reasons than speed: measured up to `SHORT` tokens only."""
SHORT = 4096


def entrants(problem: Problem) -> Iterator[tuple[str, bool, Callable[[], Entrant]]]:
    """(name, whether auto takes it, how to build it) of everybody; ours first."""
    auto = choose("auto", problem.needs).name
    for name in BACKENDS:
        if name not in SLOW or problem.length <= SHORT or name == auto:
            yield f"ours, {name}", name == auto, lambda name=name: Ours(name, problem)  # type: ignore[misc]
    for name, build in THEIRS.items():
        yield name, False, lambda build=build: build(problem)  # type: ignore[misc]


def on_slice(problem: Problem, count: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(out, dq, dk, dv) in fp64 of the last `count` tokens and the first key head with its query heads.

    dk and dv only under a causal mask, where no other query sees those keys.
    """
    group = problem.heads.queries // problem.heads.keys
    q, grad = (x[0, -count:, :group].double().requires_grad_() for x in (problem.q_1TGC, problem.grad_1THC))
    k, v = (x[0, :, 0].double().requires_grad_() for x in (problem.k_1SGC, problem.v_1SGC))
    queries, keys = problem.mask.places(1, problem.length, problem.length, q.device)
    last = type(queries)(*(x[0, -count:, None] for x in queries))
    seen_ts = problem.mask.sees(last, type(keys)(*(x[0, None] for x in keys)))
    scores_hts = torch.einsum("thc,sc->hts", q, k) * problem.heads.channels**-0.5
    weights_hts = scores_hts.masked_fill(~seen_ts, float("-inf")).softmax(-1)
    out = torch.einsum("hts,sc->thc", weights_hts, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    if not problem.mask.is_causal:
        return out.detach(), dq, None, None
    return out.detach(), dq, dk[-count:], dv[-count:]
