"""attention(q, k, v, mask): softmax attention as one function, with FlashAttention's meaning of its arguments."""

from functools import lru_cache

from torch import Tensor

from attention.attending import Attending
from attention.cu_seqlens import Part, Starts, read
from attention.mask import Mask
from settings import Refusal


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = Mask(),  # noqa: B008 (frozen)
    *,
    cu_seqlens: Starts | None = None,
    key_cu_seqlens: Starts | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + mask) v, differentiable in q, k, v and sink.

    q (B, T, H, C), k (B, S, G, C), v (B, S, G, E), G dividing H, to (B, T, H, E) of q's dtype; or packed, without B.
    Where T and S differ, a causal mask ends at the last key (bottom-right, FlashAttention 2.1 and later). A window
    counts the query itself: FlashAttention's `window_size=(w - 1, 0)` is `Mask(window=w)`.

    cu_seqlens: 0 and the end of each document of the flat tokens, in place of `mask.documents`; some may be empty.
    key_cu_seqlens: the same for keys, where they differ. A query of a document without keys sees nothing.
    sink (H,): a learned score that joins every softmax and holds no value (gpt-oss). scale: 1 / sqrt(C) if left out.
    softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, section 2); 0: they stay.
    return_lse: also the natural log-sum-exp, sink included, fp32 (fp64 for fp64), (B, H, T) or (H, T), with its
    gradient. A query that sees nothing answers 0, with a log-sum-exp of -inf, or of the sink alone.
    backend: a name of `attention.core.BACKENDS`, which is used or refused. Raises Refusal for shapes that do not fit.
    """
    _check_types(q, k, v, mask, sink, backend)
    is_packed = q.ndim == 3
    q, k, v = (x[None] if is_packed else x for x in (q, k, v))
    _check(q, k, v, sink)
    if cu_seqlens is None and key_cu_seqlens is not None:
        raise Refusal("key_cu_seqlens is the keys' side of cu_seqlens; give that too")
    part = Part(mask, None, None) if cu_seqlens is None else read(mask, cu_seqlens, key_cu_seqlens, q, k)
    out, lse = _of_part(_attending(backend, scale, softcap), (q, k, v), part, sink, return_lse)
    if is_packed:
        out, lse = out[0], None if lse is None else lse[0]
    return out if lse is None else (out, lse)


def _of_part(
    attending: Attending, tensors: tuple[Tensor, ...], part: Part, sink: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention among the tokens that take part; the other queries see nothing."""
    q, k, v = tensors
    if part.query_N is None or part.key_N is None:
        if return_lse:
            return attending.with_lse(q, k, v, part.mask, sink_H=sink)
        return attending(q, k, v, part.mask, sink_H=sink), None
    (B, T, H), E = q.shape[:3], v.shape[3]
    inner = tuple(x.flatten(0, 1)[index][None] for x, index in ((q, part.query_N), (k, part.key_N), (v, part.key_N)))
    out, lse = _of_part(attending, inner, Part(part.mask, None, None), sink, return_lse)
    whole = out.new_zeros(B * T, H, E).index_copy(0, part.query_N, out[0]).view(B, T, H, E)
    if lse is None:
        return whole, None
    nothing_H = lse.new_full((H,), float("-inf")) if sink is None else sink.to(lse.dtype)
    lse_HN = nothing_H[:, None].expand(H, B * T).index_copy(1, part.query_N, lse[0])
    return whole, lse_HN.unflatten(1, (B, T)).transpose(0, 1)


def _check_types(  # noqa: PLR0917 (what a caller gave)
    q: object, k: object, v: object, mask: object, sink: object, backend: object
) -> None:
    for name, given in (("q", q), ("k", k), ("v", v), ("sink", sink)):
        if not isinstance(given, Tensor) and (name != "sink" or given is not None):
            raise Refusal(f"{name} is of type {type(given).__name__}; give a torch.Tensor")
    if not isinstance(mask, Mask):
        raise Refusal(f"mask is of type {type(mask).__name__}; give an attention.mask.Mask")
    if not isinstance(backend, str):
        raise Refusal(f"backend={backend!r} must be a name, such as 'auto'")


def _check(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if {x.ndim for x in (q, k, v)} != {4}:
        raise Refusal(f"{shapes}: give (B, T, H, C), or (T, H, C) for all three")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise Refusal(f"{shapes}: k and v must agree in all but channels, q and k in rows and channels")
    if not q.shape[3] or not v.shape[3]:
        raise Refusal(f"{shapes}: a head needs at least one channel")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise Refusal(f"{shapes}: the key heads must divide the query heads")
    if len({(x.dtype, x.device) for x in (q, k, v)}) > 1:
        raise Refusal(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype} on {q.device}, {k.device} and {v.device}; bring them to"
            " one dtype and device"
        )
    if sink is not None and sink.shape != q.shape[2:3]:
        raise Refusal(f"sink has shape {tuple(sink.shape)}; one score for each of the {q.shape[2]} query heads")
    if sink is not None and sink.device != q.device:
        raise Refusal(f"sink is on {sink.device}, q on {q.device}; bring them to one device")


@lru_cache
def _attending(backend: str, scale: float | None, softcap: float) -> Attending:
    return Attending(backend, scale=scale, softcap=softcap)
