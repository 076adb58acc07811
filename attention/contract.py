"""What an attention backend is, what it says about itself, and what a caller asks of it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attention.mask import Mask


@dataclass(frozen=True)
class Capability:
    """What a backend can do, said once so that nobody has to try."""

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    lse_devices: tuple[str, ...]
    """Devices on which it returns the log-sum-exp."""
    window: bool
    documents: bool
    unequal_lengths: bool
    """T != S, as in decoding from a cache."""
    trainable: bool


@dataclass(frozen=True)
class Needs:
    """What a caller will ask of its backend."""

    device: str
    """Device type: `cpu`, `cuda`."""
    dtype: torch.dtype
    lse: bool = False
    window: bool = False
    documents: bool = False
    unequal_lengths: bool = False
    training: bool = False


class Backend(Protocol):
    """One way to compute softmax(q k^T * scale + mask) v."""

    @property
    def name(self) -> str: ...

    @property
    def capability(self) -> Capability: ...

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, in one clause; None when it can."""

    def __call__(
        self,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGC: Tensor,
        mask: Mask,
        *,
        scale: float | None = None,
        needs_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend. Returns out (B, T, H, C) in q's dtype and, when needed, the log-sum-exp (B, H, T).

        G divides H; head h reads key/value head h // (H / G). scale: 1 / sqrt(C) when left out. The log-sum-exp is
        natural, fp32 (fp64 for fp64 inputs), carries no gradient, and is -inf where a query sees nothing; its out is 0.
        """


def missing(capability: Capability, needs: Needs) -> list[str]:
    """What of `needs` a backend of this capability lacks, each as a clause that ends a sentence."""
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in capability.dtypes)
    facts = [
        (needs.device in capability.devices, f"runs on {' and '.join(capability.devices)}, not on {needs.device}"),
        (needs.dtype in capability.dtypes, f"takes {dtypes}, not {str(needs.dtype).removeprefix('torch.')}"),
        (not needs.lse or needs.device in capability.lse_devices, f"gives no log-sum-exp on {needs.device}"),
        (not needs.window or capability.window, "has no sliding window"),
        (not needs.documents or capability.documents, "cannot keep documents apart"),
        (not needs.unequal_lengths or capability.unequal_lengths, "needs as many queries as keys"),
        (not needs.training or capability.trainable, "has no backward pass"),
    ]
    return [clause for holds, clause in facts if not holds]
