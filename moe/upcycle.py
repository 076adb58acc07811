"""Dense feed-forward layers into experts: a mixture that begins where a dense model ended."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from moe.choice import ExpertChoiceSettings, TokenChoiceSettings
from moe.layer import MoESettings
from moe.router import KINDS
from settings import Refusal, Section


class CopySettings(Section):
    """Every expert is the dense layer (Sparse Upcycling, Komatsuzaki et al. 2023)."""

    kind: Literal["copy"] = "copy"


class SplitSettings(Section):
    """The dense layer's hidden units are cut into shards, one an expert, and all of it is repeated.

    At first a token's K experts are whole copies of the dense layer, since the shards of a copy share one row of the
    router (He et al. 2024, "virtual group" initialization).
    """

    kind: Literal["split"] = "split"


class DropSettings(Section):
    """Copies of which each has forgotten another share of its hidden units (Drop-Upcycling, Nakamura et al. 2025)."""

    kind: Literal["drop"] = "drop"
    share: float = Field(default=0.5, ge=0, le=1)
    """How many of its units an expert draws anew; 0 is kind "copy"."""


UpcycleSettings = Annotated[CopySettings | SplitSettings | DropSettings, Field(discriminator="kind")]


def upcycle(
    method: CopySettings | SplitSettings | DropSettings,
    moe: MoESettings,
    gate_up_JD: Tensor,
    down_DF: Tensor,
    router_ED: Tensor,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """First values of an MoE layer by name, made of a dense layer's `gate_up` (2F, D), gate first, and `down` (D, F).

    `experts.gate_up` (E, 2f, D) and `experts.down` (E, D, f); for kind "split" `router.weight` (E, D), made of the
    fresh `router_ED`; for shared experts a `shared.down.weight` of zeros: they add nothing at first, and learn to.
    The order of experts is copy by copy, shard by shard.

    Outside training, where no capacity drops anything, the new layer answers as the dense one did, for kinds "copy",
    "split" and "drop" of share 0, if each token takes its best experts, none of them null, and its gates are
    normalized; `router.scale` is then divided out. Gates that are not normalized are divided out as they are at
    logits of 0, so that the answer begins near the dense one. Kind "split" rests on copies that score differently:
    where rounding makes two the same (one token in a million), a token can get shards of both. With
    `router.groups = {count = copies, keep = K / shards}` it never does.

    Raises Refusal naming what does not fit.
    """
    num_shards = check_fits(method, moe, down_DF.shape[1])
    num_copies = moe.num_experts // num_shards
    gate_up = gate_up_JD.unflatten(0, (2, num_shards, -1)).transpose(0, 1).repeat(num_copies, 1, 1, 1)
    down = down_DF.unflatten(1, (num_shards, -1)).transpose(0, 1).repeat(num_copies, 1, 1)
    if method.kind == "drop":
        for (gate_FD, up_FD), expert_DF in zip(gate_up, down, strict=True):
            redraw((gate_FD, up_FD, expert_DF.T), method.share, generator)
    # Each of a copy's shards is weighed by its own gate, and together they are to count as one whole.
    down *= num_shards / sum_of_gates(moe)
    weights = {"experts.gate_up": gate_up.flatten(1, 2), "experts.down": down}
    if method.kind == "split":
        weights["router.weight"] = router_ED[::num_shards].repeat_interleave(num_shards, dim=0)
    if moe.num_shared_experts:
        weights["shared.down.weight"] = down.new_zeros(len(down_DF), moe.num_shared_experts * moe.expert_width)
    return weights


def redraw(matrices_FD: tuple[Tensor, ...], share: float, generator: torch.Generator) -> None:
    """Replace the same share of the rows of every matrix, a row a hidden unit, in place.

    Drawn from a normal distribution with the mean and the deviation of what is replaced, matrix by matrix.
    """
    num_units = len(matrices_FD[0])
    units = torch.randperm(num_units, generator=generator)[: round(share * num_units)]
    if not len(units):
        return
    for matrix_FD in matrices_FD:
        old = matrix_FD[units]
        noise = torch.randn(old.shape, generator=generator, dtype=old.dtype)
        matrix_FD[units] = old.mean() + old.std(correction=0) * noise


def sum_of_gates(moe: MoESettings) -> float:
    """What the gates of a token's experts sum to, as long as no logit differs from 0; normalized, whatever they are."""
    router = moe.router
    if not isinstance(router, ExpertChoiceSettings) and router.normalize:
        return router.scale
    log_scores, _ = KINDS[router.kind]
    score = log_scores(torch.zeros(1, moe.num_experts))[0, 0].exp().item()
    return moe.experts_per_token * score * router.scale


def check_fits(method: CopySettings | SplitSettings | DropSettings, moe: MoESettings, dense_width: int) -> int:
    """Into how many shards a dense layer of so many hidden units is cut; Refusal where that cannot be."""
    sizes = f"the dense feed_forward_width={dense_width}"
    if method.kind != "split":
        if moe.expert_width != dense_width:
            raise Refusal(
                f'initial.upcycle.kind="{method.kind}": model.moe.expert_width={moe.expert_width} must be {sizes};'
                ' set it so, or set initial.upcycle.kind="split" for experts that are parts of the dense layer'
            )
        return 1
    if dense_width % moe.expert_width:
        raise Refusal(
            f'initial.upcycle.kind="split": model.moe.expert_width={moe.expert_width} must divide {sizes};'
            f" try {_divisor_near(dense_width, moe.expert_width)}"
        )
    num_shards = dense_width // moe.expert_width
    for key, number in (("num_experts", moe.num_experts), ("experts_per_token", moe.experts_per_token)):
        if number % num_shards:
            raise Refusal(
                f'initial.upcycle.kind="split": model.moe.{key}={number} must be a multiple of the {num_shards} shards'
                f" (expert_width={moe.expert_width} of {sizes}); try {-(-number // num_shards) * num_shards}"
            )
    if not isinstance(moe.router, TokenChoiceSettings) or moe.null_experts is not None:
        raise Refusal(
            'initial.upcycle.kind="split" needs a router by which each token takes its K best experts, none of them'
            ' null, since a shard alone is no copy; set model.moe.router.kind="softmax" and leave out'
            ' model.moe.null_experts, or set initial.upcycle.kind="copy"'
        )
    if moe.router.groups is not None and moe.num_experts // moe.router.groups.count % num_shards:
        raise Refusal(
            f'initial.upcycle.kind="split": model.moe.router.groups.count={moe.router.groups.count} cuts copies of'
            f" {num_shards} shards apart; try {moe.num_experts // num_shards}"
        )
    return num_shards


def _divisor_near(number: int, size: int) -> int:
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - size))
