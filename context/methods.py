"""The ways to attend over ranks, by name, and what puts one in the place of a layer's own attention."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from attention.attend import Kept, attend
from attention.attending import Attending
from attention.contract import Backend, Needs, Options
from attention.mask import Documents, Mask
from context.comm import Comm
from context.gather import Gather
from context.groupcast import Groupcast
from context.plan import SplitMask
from context.ring import Ring
from context.tiles import Spread
from context.ulysses import Ulysses
from settings import Refusal, nearest


@dataclass(frozen=True)
class Way:
    """A way to attend over ranks."""

    description: str
    over: Callable[[Backend, Comm, int | None], Backend]
    """(what computes on one rank, the ranks, the most of them that exchange heads) to the backend over all ranks."""
    cuts: bool = True
    """A rank computes tiles of the mask; otherwise whole rows, of some heads."""


METHODS: dict[str, Way] = {
    "ring": Way(
        "whole shares of keys go round, the next while one is worked on; least memory",
        lambda inner, comm, _: Spread(inner, Ring(comm)),
    ),
    "gather": Way(
        "all keys come to every rank; simplest, for few key heads",
        lambda inner, comm, _: Spread(inner, Gather(comm)),
    ),
    "groupcast": Way(
        "each rank gets just the keys that it reads; least traffic for packed documents and windows",
        lambda inner, comm, _: Spread(inner, Groupcast(comm)),
    ),
    "ulysses": Way(
        "tokens are exchanged for heads; each rank has whole rows of some heads",
        lambda inner, comm, _: Ulysses(inner, comm),
        cuts=False,
    ),
    "usp": Way(
        "ulysses among as many neighbours as the heads allow, a ring across their groups",
        lambda inner, comm, at_most: Ulysses(inner, comm, Ring, at_most),
    ),
}


@dataclass(frozen=True)
class Method:
    """A way to attend, over these ranks."""

    way: Way
    comm: Comm
    ulysses: int | None = None
    """The most neighbours that exchange heads, for `usp` alone; None: as many as the heads allow."""

    def agree(self, mask: SplitMask) -> None:
        """Raise Refusal on every rank where they have different documents; asked once for each micro-batch.

        Otherwise some methods would wait for each other for good, and a ring give wrong answers.
        """
        assert mask.documents is not None
        known = _LAST_AGREED.get(self.comm)
        if known is None or known() is not mask.documents:
            self.comm.check_same(repr((mask.documents.lengths, mask.layout)), "the documents of attention")
            _LAST_AGREED[self.comm] = ref(mask.documents)

    def over(self, inner: Backend) -> Backend:
        """The backend over ranks, of what computes on one."""
        return self.way.over(inner, self.comm, self.ulysses)

    def needs(self, needs: Needs) -> Needs:
        """What it takes of the backend on one rank to answer such needs over all."""
        # Where heads are replicated or tiles cut, answers are parts of sums.
        whole = replace(needs, documents=True, partial=True)
        return replace(whole, unequal_lengths=True, offset=needs.window) if self.way.cuts else whole


# All layers of a micro-batch share its documents, and all ranks meet a new micro-batch at the same call.
_LAST_AGREED: WeakKeyDictionary[Comm, ref[Documents]] = WeakKeyDictionary()


def build_method(name: str, comm: Comm, ulysses: int | None = None) -> Method:
    """The method of this name in METHODS over these ranks; ulysses: see `Method`."""
    if name not in METHODS:
        raise Refusal(f"unknown way to attend over ranks {name!r}{nearest(name, list(METHODS))}")
    if ulysses is not None and ulysses < 1:
        raise Refusal(f"ulysses={ulysses} must be at least 1; leave it out for as many ranks as the heads allow")
    return Method(METHODS[name], comm, ulysses)


class Split:
    """What a layer calls to attend when its rows lie on several ranks: over the ranks for a `SplitMask`, and as before,
    whole rows by itself, for any other mask."""

    def __init__(self, local: Attending, method: Method) -> None:
        self.local, self.method = local, method

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
        """See `attention.attending.Attending`; of a split row, q, k, v and the answer are this rank's tokens."""
        if not isinstance(mask, SplitMask):
            return self.local(q_BTHC, k_BSGC, v_BSGE, mask, sink_H=sink_H, kept=kept)
        self.method.agree(mask)
        backend = self.backend(self._needs(q_BTHC, k_BSGC, v_BSGE, mask, sink_H))
        return attend(backend, q_BTHC, k_BSGC, v_BSGE, mask, self.options, sink_H=sink_H, kept=kept)[0]

    def with_lse(
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, *, sink_H: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(out (B, T, H, E), log-sum-exp (B, H, T) fp32), both with their gradients."""
        if not isinstance(mask, SplitMask):
            return self.local.with_lse(q_BTHC, k_BSGC, v_BSGE, mask, sink_H=sink_H)
        self.method.agree(mask)
        needs = self._needs(q_BTHC, k_BSGC, v_BSGE, mask, sink_H)
        learns = needs.training
        backend = self.backend(replace(needs, lse_gradient=learns))
        return attend(backend, q_BTHC, k_BSGC, v_BSGE, mask, self.options, sink_H=sink_H, needs_lse_gradient=learns)

    def backend(self, needs: Needs) -> Backend:
        """The backend over ranks for these needs; refused where the local one cannot do its part."""
        return self.method.over(self.local.backend(self.method.needs(needs)))

    @property
    def options(self) -> Options:
        return self.local.options

    @property
    def picked(self) -> dict[str, str]:
        """See `attention.attending.Attending`: the backends that compute on one rank."""
        return self.local.picked

    def _needs(self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, sink_H: Tensor | None) -> Needs:
        tensors = (q_BTHC, k_BSGC, v_BSGE, sink_H)
        learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        return Needs.of(q_BTHC, k_BSGC, v_BSGE, mask, self.options, training=learns)
