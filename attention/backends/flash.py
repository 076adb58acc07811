"""FlashAttention, by whichever library is there: flash-attn 2, 3 or 4, or the copy of 2 that is built into torch."""

from functools import cached_property, partial

import torch
from torch import Tensor

from attention.backends.band import Band, band_of
from attention.backends.flash_libraries import LIBRARIES, Library, Segments
from attention.backends.fused import Widths, backward, forward
from attention.contract import Capability, Options
from attention.mask import Mask
from settings import Refusal

MAX_CHANNELS = 256


class Flash:
    """FlashAttention 2, 3 or 4, or torch's copy of it: documents, windows and tiles by the kernel itself."""

    name = "flash"
    widths = Widths(are_equal=True, multiple=8)

    def __init__(self, library: Library | None = None) -> None:
        """library: left out, the best that is found, looked for when it is first asked for."""
        self._given = library

    @property
    def capability(self) -> Capability:
        return Capability(
            devices=("cuda",),
            dtypes=(torch.bfloat16, torch.float16),
            prefix=False,
            first_tokens=False,
            softcap=self.library is not None and self.library.has_softcap,
            max_channels=MAX_CHANNELS,
            partial=False,
        )

    @cached_property
    def library(self) -> Library | None:
        """The one in use; None: there is none."""
        if self._given is not None or not torch.cuda.is_available():
            return self._given
        major, _ = torch.cuda.get_device_capability()
        return next((library for library in LIBRARIES if major in library.majors and library.is_there()), None)

    def unavailable(self) -> str | None:
        if self.library is not None:
            return None
        if not torch.cuda.is_available():
            return "needs an NVIDIA GPU; torch sees none here"
        return "needs an NVIDIA GPU of compute capability 8.0 or newer"

    def forward(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options
    ) -> tuple[Tensor, Tensor]:
        return forward(partial(self._forward, mask, options), self.widths, q_BTHC, k_BSGC, v_BSGE, options)

    def _forward(  # noqa: PLR0917 (a product has many factors)
        self, mask: Mask, options: Options, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert self.library is not None
        (B, T, H), S = q_BTHC.shape[:3], k_BSGC.shape[1]
        mask.check(B, T, S)
        rows = _rows(T, S, mask)
        if rows is None:
            return torch.zeros_like(q_BTHC), q_BTHC.new_full((B, H, T), float("-inf"), dtype=torch.float32)
        q, k, v = _flat(q_BTHC, rows.queries), _flat(k_BSGC, rows.keys), _flat(v_BSGC, rows.keys)
        segments = _segments(B, rows, mask, q.device)
        out, lse_HN = self.library.forward(q, k, v, segments, scale, options.softcap)
        lse_BHT = lse_HN.unflatten(1, (B, -1)).transpose(0, 1)
        if mask.key_documents is not None:
            # More queries than keys leave some that see nothing, and libraries differ on their log-sum-exp.
            lse_BHT = lse_BHT.masked_fill(lse_BHT.isinf(), float("-inf"))
        out_BTHC = out.unflatten(0, (B, -1))
        if rows.queries == slice(0, T):
            return out_BTHC, lse_BHT
        whole_BTHC = torch.zeros_like(q_BTHC)
        whole_BHT = lse_BHT.new_full((B, H, T), float("-inf"))
        whole_BTHC[:, rows.queries], whole_BHT[:, :, rows.queries] = out_BTHC, lse_BHT
        return whole_BTHC, whole_BHT

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
        if grad_lse_BHT is not None and v_BSGE.shape[-1] >= MAX_CHANNELS:
            raise Refusal(
                f"attention.backend='flash' takes the gradient of the log-sum-exp with less than {MAX_CHANNELS} "
                f'channels a head, not with {v_BSGE.shape[-1]}; use backend = "auto" with a smaller head'
            )
        tensors = (grad_BTHE, q_BTHC, k_BSGC, v_BSGE, out_BTHE, lse_BHT)
        return backward(partial(self._backward, mask, options), self.widths, *tensors, options, grad_lse_BHT)

    def _backward(  # noqa: PLR0917
        self,
        mask: Mask,
        options: Options,
        grad_BTHC: Tensor,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGC: Tensor,
        out_BTHC: Tensor,
        lse_BHT: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert self.library is not None
        (B, T), S = q_BTHC.shape[:2], k_BSGC.shape[1]
        rows = _rows(T, S, mask)
        if rows is None:
            return torch.zeros_like(q_BTHC), torch.zeros_like(k_BSGC), torch.zeros_like(v_BSGC)
        grad, q, out = (_flat(x, rows.queries) for x in (grad_BTHC, q_BTHC, out_BTHC))
        k, v = _flat(k_BSGC, rows.keys), _flat(v_BSGC, rows.keys)
        # exp(score - inf) is 0, whichever value a library itself gives to queries that see nothing.
        lse_HN = lse_BHT[:, :, rows.queries].transpose(0, 1).flatten(1)
        lse_HN = lse_HN.masked_fill(lse_HN.isinf(), float("inf")).contiguous()
        segments = _segments(B, rows, mask, q.device)
        parts = self.library.backward((grad, q, k, v, out, lse_HN), segments, scale, options.softcap)
        places = (rows.queries, rows.keys, rows.keys)
        wholes = (q_BTHC, k_BSGC, v_BSGC)
        dq, dk, dv = (_whole(part, place, like) for part, place, like in zip(parts, places, wholes, strict=True))
        return dq, dk, dv


def _rows(T: int, S: int, mask: Mask) -> Band | None:
    """What of each row takes part; with documents all of it."""
    if mask.documents is None:
        return band_of(T, S, mask)
    left = None if mask.window is None else mask.window - 1
    return Band(slice(0, T), slice(0, S), left, 0 if mask.is_causal else None)


def _segments(num_rows: int, rows: Band, mask: Mask, device: torch.device) -> Segments:
    """Where documents start, or rows that are one document."""
    if mask.documents is not None:
        keys = mask.key_documents or mask.documents
        starts = (mask.documents.cu_seqlens(device), keys.cu_seqlens(device))
        return Segments(*starts, max(mask.documents.lengths), max(keys.lengths), rows.left, rows.right)
    lengths = [place.stop - place.start for place in (rows.queries, rows.keys)]
    starts_of = [torch.arange(0, (num_rows + 1) * n, n, dtype=torch.int32, device=device) for n in lengths]
    return Segments(starts_of[0], starts_of[1], lengths[0], lengths[1], rows.left, rows.right)


def _flat(x_BT: Tensor, place: slice) -> Tensor:
    return x_BT[:, place].flatten(0, 1).contiguous()


def _whole(part_N: Tensor, place: slice, like_BT: Tensor) -> Tensor:
    """Back among the tokens that took no part, which get a gradient of 0."""
    part_BT = part_N.unflatten(0, (like_BT.shape[0], -1))
    if part_BT.shape[1] == like_BT.shape[1]:
        return part_BT
    whole_BT = torch.zeros_like(like_BT)
    whole_BT[:, place] = part_BT
    return whole_BT
