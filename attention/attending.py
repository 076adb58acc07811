"""Attending: what a layer calls to attend; it chooses a backend for what is asked, once, and tells which."""

import torch
from torch import Tensor

from attention.attend import Kept, attend
from attention.contract import Backend, Needs, Options
from attention.core import check_name, choose
from attention.mask import Mask


class Attending:
    """Softmax attention by a backend that is chosen the first time something of a kind is asked for, then kept.

    name: a backend's, which is used or refused, or "auto". scale, softcap: see `attention.contract.Options`.
    """

    def __init__(self, name: str = "auto", *, scale: float | None = None, softcap: float = 0.0) -> None:
        self.name = check_name(name)
        self.options = Options(scale=scale, softcap=softcap)
        self._picked: dict[Needs, Backend] = {}

    def __call__(
        self,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGE: Tensor,
        mask: Mask,
        *,
        sink_H: Tensor | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """out (B, T, H, E); sink_H, kept: see `attention.attend.attend`."""
        learns = _learns(q_BTHC, k_BSGC, v_BSGE, sink_H)
        needs = Needs.of(q_BTHC, k_BSGC, v_BSGE, mask, self.options, training=learns)
        return attend(self.backend(needs), q_BTHC, k_BSGC, v_BSGE, mask, self.options, sink_H=sink_H, kept=kept)[0]

    def with_lse(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, *, sink_H: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(out (B, T, H, E), log-sum-exp (B, H, T) fp32), both with their gradients."""
        learns = _learns(q_BTHC, k_BSGC, v_BSGE, sink_H)
        needs = Needs.of(q_BTHC, k_BSGC, v_BSGE, mask, self.options, training=learns, lse_gradient=learns)
        return attend(
            self.backend(needs), q_BTHC, k_BSGC, v_BSGE, mask, self.options, sink_H=sink_H, needs_lse_gradient=learns
        )

    def backend(self, needs: Needs) -> Backend:
        """The backend for these needs; raises Refusal where there is none, or where the one that was named cannot."""
        if needs not in self._picked:
            self._picked[needs] = choose(self.name, needs)
        return self._picked[needs]

    @property
    def picked(self) -> dict[str, str]:
        """What was chosen so far: {"cpu float32: window, documents, training": "sdpa"}."""
        return {str(needs): backend.name for needs, backend in self._picked.items()}


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
