"""torch's flex_attention: a kernel compiled for each mask. Trains on CUDA; on a CPU it only looks ahead, unfused."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from attention.backends.fused import Widths, backward, forward
from attention.contract import Capability, Options
from attention.mask import Mask

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Flex:
    """torch's flex_attention: any mask, any softcap, trains on CUDA only.

    Its backward pass runs the forward pass again: torch has no other public door to it.
    """

    name = "flex"
    # Kernels on CUDA take heads of at least 16 channels.
    widths = Widths(multiple=16)

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        """function: in place of flex_attention, which is compiled where there is a GPU."""
        self._function = function

    @property
    def capability(self) -> Capability:
        if torch.cuda.is_available():
            return Capability(("cuda",), (torch.float32, *LOW_PRECISION))
        # torch 2.11 to 2.13 refuse any input that wants a gradient on a CPU.
        return Capability(("cpu",), (torch.float32, torch.float64, *LOW_PRECISION), trainable=False)

    def unavailable(self) -> str | None:
        return None

    def forward(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options
    ) -> tuple[Tensor, Tensor]:
        inner = partial(self._forward, mask, options.softcap)
        with torch.no_grad():
            return forward(inner, self.widths, q_BTHC, k_BSGC, v_BSGE, options)

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
        tensors = (grad_BTHE, q_BTHC, k_BSGC, v_BSGE, out_BTHE, lse_BHT)
        inner = partial(self._backward, mask, options.softcap)
        return backward(inner, self.widths, *tensors, options, grad_lse_BHT)

    def _forward(  # noqa: PLR0917
        self, mask: Mask, softcap: float, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        (B, T), S = q_BTHC.shape[:2], k_BSGC.shape[1]
        mask.check(B, T, S)
        if not T or not S:
            nothing_BTH = q_BTHC.new_zeros(q_BTHC.shape[:3], dtype=torch.promote_types(q_BTHC.dtype, torch.float32))
            return q_BTHC.new_zeros(*q_BTHC.shape[:3], v_BSGE.shape[-1]), nothing_BTH.transpose(1, 2) - torch.inf
        function = self._function or default_function(q_BTHC.device.type)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BSGC, v_BSGE))
        out, aux = function(
            *(q, k, v),
            score_mod=capped(softcap) if softcap else None,
            block_mask=block_mask(mask, B, T, S, q.device),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
        return out.transpose(1, 2), aux.lse

    def _backward(  # noqa: PLR0917
        self,
        mask: Mask,
        softcap: float,
        grad_BTHE: Tensor,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGE: Tensor,
        out_BTHE: Tensor,
        lse_BHT: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weights here are those of the forward pass times exp(own log-sum-exp - the larger one), query by query.

        So is the gradient of out; and what the larger softmax takes from each weight's gradient, sum(grad * out),
        differs from what this one would take by a number a query, which the own log-sum-exp's gradient can carry.
        """
        if not q_BTHC.shape[1] or not k_BSGC.shape[1]:
            return torch.zeros_like(q_BTHC), torch.zeros_like(k_BSGC), torch.zeros_like(v_BSGE)
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q_BTHC, k_BSGC, v_BSGE))
            own_BTHE, own_BHT = self._forward(mask, softcap, q, k, v, scale)
        share_BHT = (own_BHT.detach() - lse_BHT).exp().nan_to_num(0.0)
        share_BTH1 = share_BHT.transpose(1, 2)[..., None]
        wide, wide_out = grad_BTHE.to(lse_BHT.dtype), out_BTHE.to(lse_BHT.dtype)
        excess_BTH = (wide * (own_BTHE.detach().to(lse_BHT.dtype) - wide_out)).sum(-1)
        grads = ((wide * share_BTH1).to(own_BTHE.dtype), (excess_BTH.transpose(1, 2) * share_BHT).to(own_BHT.dtype))
        dq, dk, dv = torch.autograd.grad((own_BTHE, own_BHT), (q, k, v), grads)
        return dq, dk, dv


@lru_cache
def default_function(device_type: str) -> Any:
    """flex_attention, compiled on CUDA; on a CPU the compiled one gives no log-sum-exp."""
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


def capped(softcap: float) -> Callable[..., Tensor]:
    """The change of a score that a softcap is."""

    def score_mod(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@lru_cache(maxsize=32)
def block_mask(mask: Mask, B: int, T: int, S: int, device: torch.device) -> BlockMask:
    """Which blocks hold anything to see; every layer of a step asks for the same one."""
    rows = None if mask.documents is None and isinstance(mask.prefix, int) else B
    # Uncompiled, the whole mask is drawn first.
    return create_block_mask(mask_mod(mask, B, T, S, device), rows, None, T, S, device, _compile=device.type == "cuda")


def mask_mod(mask: Mask, B: int, T: int, S: int, device: torch.device) -> Callable[..., Tensor]:
    """`Mask.sees` as flex_attention asks it: a function of numbers, with tables where they depend on the token."""
    queries, keys = mask.places(B, T, S, device)
    offset = S - T if mask.offset is None else mask.offset
    has_documents = mask.documents is not None
    prefix_D = torch.tensor(mask.prefixes, device=device)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if has_documents:
            document, place, key_place = queries.document[row, query], queries.place[row, query], keys.place[row, key]
            seen = document == keys.document[row, key]
        else:
            document, place, key_place = row, query + offset, key
            seen = key >= 0
        if not mask.is_causal:
            return seen
        in_view = key_place <= place
        if mask.window is not None:
            in_view = in_view & ((key_place > place - mask.window) | (key_place < mask.first_tokens))
        if any(mask.prefixes):
            in_view = in_view | (key_place < (prefix_D[document] if len(prefix_D) > 1 else mask.prefixes[0]))
        return seen & in_view

    return sees
