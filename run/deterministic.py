"""The same bits at every run: what torch is told, and what cannot be had with it is refused by name."""

import os
import re

import torch

from attention.core import BACKENDS
from model.transformer import ModelSettings
from settings import Refusal

WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS adds up in the same order every time."""
WITHOUT_ORDER = ("megablocks_grouped", "megablocks_sparse")
"""Of `model.moe.experts`: other people's kernels, of which nobody here knows in which order they add up."""


def fix_order(is_on: bool) -> None:
    """Let torch compute in an order that never changes, or as it likes. Before anything has run on a GPU.

    Raises Refusal where the environment asks cuBLAS for something else.
    """
    torch.use_deterministic_algorithms(is_on)
    if not is_on:
        return
    given = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[0])
    if given not in WORKSPACES:
        raise Refusal(
            f"deterministic=true: CUBLAS_WORKSPACE_CONFIG={given} in the environment lets cuBLAS change its order; "
            f"unset it, or set {' or '.join(WORKSPACES)}"
        )
    torch.backends.cudnn.benchmark = False
    # Filling memory that is about to be overwritten costs time and changes no number.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (typed as a plain module)


def check_deterministic(model: ModelSettings) -> None:
    """Raises ValueError where a way to compute was asked for by name that adds up in no fixed order."""
    backend = model.attention.backend
    if backend in BACKENDS and not BACKENDS[backend].capability.deterministic:
        raise ValueError(
            f'deterministic=true: model.attention.backend="{backend}" adds gradients up in no fixed order; use "auto"'
        )
    if model.moe is not None and model.moe.experts in WITHOUT_ORDER:
        raise ValueError(
            f'deterministic=true: model.moe.experts="{model.moe.experts}" adds up in no known order; use "auto"'
        )


def forbidden(error: RuntimeError) -> str | None:
    """What to say of an error by which torch forbids an operator; None for any other error."""
    said = str(error)
    if "use_deterministic_algorithms" not in said:
        return None
    named = re.match(r"(\S+) does not have a deterministic implementation", said)
    what = f"{named.group(1)} has no implementation in torch that adds up in a fixed order" if named else said
    return (
        f"deterministic=true: {what}. Compute it another way (model.attention.backend, model.moe.experts), or leave"
        " deterministic out"
    )
