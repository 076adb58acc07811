"""What an attention backend is, what it says about itself, and what a caller asks of it."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attention.mask import Mask
from settings import Refusal


@dataclass(frozen=True)
class Options:
    """What beside the tensors and the mask decides the numbers."""

    scale: float | None = None
    """Multiplies the scores; None: 1 / sqrt(C), C the channels of a query head."""
    softcap: float = 0.0
    """Scores become softcap * tanh(scores / softcap) after scaling; 0: they stay."""
    is_partial: bool = False
    """The answer is one part of several that are added up: out and all gradients come back in fp32 (fp64 for fp64)."""

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise Refusal(f"scale={self.scale} must be above 0 and finite; leave it out for 1 / sqrt(channels)")
        if not 0 <= self.softcap < math.inf:
            raise Refusal(f"softcap={self.softcap} must be above 0 and finite, or 0 for none")

    def scale_for(self, channels: int) -> float:
        return channels**-0.5 if self.scale is None else self.scale


PLAIN = Options()


@dataclass(frozen=True)
class Capability:
    """What a backend can do, said once so that nobody has to try."""

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    window: bool = True
    documents: bool = True
    unequal_lengths: bool = True
    """T != S, as in decoding from a cache."""
    offset: bool = True
    """A causal or windowed mask whose last query does not stand at the last key: a tile of a larger mask."""
    key_documents: bool = True
    """Documents of which the keys have other lengths than the queries."""
    prefix: bool = True
    first_tokens: bool = True
    softcap: bool = True
    value_channels: bool = True
    """Values of another size than queries and keys."""
    max_channels: int | None = None
    trainable: bool = True
    partial: bool = True
    """Answers in fp32 whatever the inputs are (`Options.is_partial`)."""
    lse_gradient: bool = True
    """Takes the gradient of the log-sum-exp."""
    deterministic: bool = True
    """The same gradients bit for bit at every run, once torch is told to use deterministic algorithms."""


@dataclass(frozen=True)
class Needs:
    """What a caller will ask of its backend."""

    device: str
    """Device type: `cpu`, `cuda`."""
    dtype: torch.dtype
    window: bool = False
    documents: bool = False
    unequal_lengths: bool = False
    offset: bool = False
    key_documents: bool = False
    prefix: bool = False
    first_tokens: bool = False
    softcap: bool = False
    value_channels: bool = False
    channels: int = 1
    """The most channels of a head, of queries, keys or values."""
    training: bool = False
    partial: bool = False
    lse_gradient: bool = False

    @classmethod
    def of(
        cls,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGE: Tensor,
        mask: Mask,
        options: Options = PLAIN,
        *,
        training: bool = False,
        lse_gradient: bool = False,
    ) -> "Needs":
        """What it takes to compute just this."""
        offset = k_BSGC.shape[1] - q_BTHC.shape[1]
        return cls(
            q_BTHC.device.type,
            q_BTHC.dtype,
            window=mask.window is not None,
            documents=mask.documents is not None,
            unequal_lengths=mask.key_documents is None and offset != 0,
            # Where all is seen, or queries end where keys do, an offset says nothing new.
            offset=mask.is_causal and mask.offset not in {None, offset},
            key_documents=mask.key_documents is not None,
            prefix=any(mask.prefixes),
            first_tokens=mask.window is not None and mask.first_tokens > 0,
            softcap=options.softcap > 0,
            value_channels=v_BSGE.shape[3] != q_BTHC.shape[3],
            channels=max(q_BTHC.shape[3], v_BSGE.shape[3]),
            training=training,
            partial=options.is_partial,
            lse_gradient=lse_gradient,
        )

    def __str__(self) -> str:
        """Like `cpu float32: window, documents, training`."""
        what = [key for key in (*PLAIN_FACTS, "training") if getattr(self, key)]
        return f"{self.device} {plain(self.dtype)}" + (f": {', '.join(what)}" if what else "")


class Backend(Protocol):
    """One way to compute softmax(q k^T * scale + mask) v, and its gradients from the parts.

    Shapes: q (B, T, H, C), k (B, S, G, C), v (B, S, G, E); G divides H, and head h reads key head h // (H / G). The
    log-sum-exp is natural, (B, H, T), fp32 (fp64 for fp64), and -inf where a query sees nothing; its out is 0.
    """

    @property
    def name(self) -> str: ...

    @property
    def capability(self) -> Capability: ...

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, in one clause; None when it can."""

    def forward(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, options: Options
    ) -> tuple[Tensor, Tensor]:
        """(out (B, T, H, E), log-sum-exp (B, H, T)). Called without a graph: nothing in it is differentiated."""

    def backward(  # noqa: PLR0917 (a product has many factors)
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
        """Gradients of q, k and v.

        out and log-sum-exp may be those of a larger softmax of which these keys are a part (other tiles, a sink): the
        weights are exp(score - log-sum-exp), and out enters through sum(grad * out) alone.
        """


PLAIN_FACTS = {
    "window": "has no sliding window",
    "documents": "cannot keep documents apart",
    "unequal_lengths": "needs as many queries as keys",
    "offset": "takes no tile of a larger mask",
    "key_documents": "needs documents of as many keys as queries",
    "prefix": "has no prefix mask",
    "first_tokens": "cannot keep a document's first tokens in view",
    "softcap": "has no softcap",
    "value_channels": "needs values as wide as keys",
    "partial": "gives no fp32 answers to lower-precision inputs",
    "lse_gradient": "takes no gradient of the log-sum-exp",
}


def plain(dtype: torch.dtype) -> str:
    """Like `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def missing(capability: Capability, needs: Needs) -> list[str]:
    """What of `needs` a backend of this capability lacks, each as a clause that ends a sentence."""
    dtypes = ", ".join(map(plain, capability.dtypes))
    most = capability.max_channels
    facts = [
        (needs.device in capability.devices, f"runs on {' and '.join(capability.devices)}, not on {needs.device}"),
        (needs.dtype in capability.dtypes, f"takes {dtypes}, not {plain(needs.dtype)}"),
        (most is None or needs.channels <= most, f"takes at most {most} channels a head, not {needs.channels}"),
        (not needs.training or capability.trainable, "has no backward pass"),
    ]
    facts += [(not getattr(needs, key) or getattr(capability, key), clause) for key, clause in PLAIN_FACTS.items()]
    return [clause for holds, clause in facts if not holds]
