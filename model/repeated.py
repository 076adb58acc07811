"""What is computed a second time because it was not kept: operations of one token, products of matrices alone."""

from collections.abc import Iterable, Sequence

from model.block import Kind
from model.size import attention_layer, mean_keys_of_documents, num_scored
from model.transformer import ModelSettings


def repeated_flops(
    settings: ModelSettings, kinds: Iterable[Kind], device: str, lengths: Sequence[int], window: int | None = None
) -> float:
    """Of all layers, each as its kind says; lengths, window: see `attention_flops_per_token`."""
    return sum(repeated_by_layer(settings, layer, kind, device, lengths, window) for layer, kind in enumerate(kinds))


def repeated_by_layer(  # noqa: PLR0917 (what a layer is and sees)
    settings: ModelSettings,
    layer: int,
    kind: Kind,
    device: str,
    lengths: Sequence[int],
    window: int | None = None,
) -> float:
    """Of one layer."""
    moe = settings.moe if settings.feed_forward_kind(layer) == "moe" else None
    up = 0 if moe is None or moe.recompute == "none" else 2 * moe.experts_per_token * settings.width * moe.expert_width
    if kind == "none":
        return 2 * up
    attention = attention_layer(settings)
    weights = up + attention.projections + _feed_forward(settings, layer, device)
    if kind == "ops":
        return 2 * weights
    seen = [own for own in (settings.window(layer), window) if own is not None]
    return 2 * (weights + attention.channels * mean_keys_of_documents(lengths, min(seen, default=None)))


def _feed_forward(settings: ModelSettings, layer: int, device: str) -> int:
    """Weights that a token is multiplied with again behind attention."""
    D, moe = settings.width, settings.moe
    if moe is None or settings.feed_forward_kind(layer) == "dense":
        # A second pass ends where its last tensor is saved: on GPUs before the last product, whose input that is.
        return (3 if device == "cpu" else 2) * D * (settings.feed_forward_width or 0)
    experts = moe.experts_per_token + moe.num_shared_experts
    return D * (num_scored(moe) + 3 * experts * moe.expert_width + moe.shared_gate)
