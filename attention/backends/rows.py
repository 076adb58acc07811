"""Rows that are one document each, as calls of a fused kernel that knows three masks: all, causal, or one drawn for it.

Nearly all kernels agree on these three and on nothing else: not on where a causal mask stands when there are more keys
than queries, nor on what a query that sees nothing answers. No call here asks them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from attention.mask import Mask

QUERY_BLOCK = 1024
"""Queries of one call that needs its mask drawn."""
DRAWN_CELLS = 2**24
"""Cells of one drawing: fewer queries go together where they see more keys than would fit."""
SMALLEST_TILE = 64
"""Queries of a tile of a narrower window: smaller calls are all overhead."""
CACHED_CELLS = 2**20
"""Drawings larger than this are made anew each time: a store of them would hold gigabytes."""


class Kernel(Protocol):
    """A fused softmax attention and its gradients. bias_TS: added to the scores, 0 or -inf, with no empty row.

    Tensors are laid out as in `attention.contract.Backend`; is_causal comes only with T == S and no bias.
    """

    def forward(  # noqa: PLR0917 (a product has many factors)
        self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, bias_TS: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(  # noqa: PLR0917
        self,
        grad_BTHE: Tensor,
        q_BTHC: Tensor,
        k_BSGC: Tensor,
        v_BSGE: Tensor,
        out_BTHE: Tensor,
        lse_BHT: Tensor,
        bias_TS: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By an out and log-sum-exp that may come from a larger softmax."""


@dataclass(frozen=True)
class Call:
    """One call of the kernel: these queries over these keys, every query with at least one key to see."""

    queries: slice
    keys: slice
    is_causal: bool = False
    mask: Mask | None = None
    """To be drawn; None: all is seen, or all that is causal."""
    tiles: int = 1
    """The queries are cut into so many tiles, which the kernel takes as rows of a batch: one drawing serves all."""
    head: int = 0
    """So many first keys of the row stand before the keys of each tile."""
    is_more: bool = False
    """The queries were in the call before, over other keys: the two answers are put together."""

    @property
    def tile_queries(self) -> int:
        return (self.queries.stop - self.queries.start) // self.tiles

    @property
    def tile_keys(self) -> int:
        """Of its own, beside the head; neighbouring tiles share those that lie further back than one tile."""
        return self.keys.stop - self.keys.start - (self.tiles - 1) * self.tile_queries


def calls(T: int, S: int, mask: Mask) -> Iterator[Call]:
    """The calls that T queries over S keys of one document make; queries that see nothing are in none of them."""
    if not T or not S:
        return
    if not mask.is_causal:
        yield Call(slice(0, T), slice(0, S))
        return
    assert isinstance(mask.prefix, int), "of one document"
    offset = S - T if mask.offset is None else mask.offset
    first, stop = (0, T) if mask.prefix else (max(0, -offset), T)
    if mask.window is None or mask.window >= T + offset:
        yield from _causal_calls(first, stop, S, offset, mask.prefix)
    elif mask.prefix or mask.first_tokens:
        yield from _window_calls(first, stop, S, offset, mask)
    else:
        # The last query that still sees the last key.
        yield from _window_calls(first, min(T, S - offset + mask.window - 1), S, offset, mask)


def _causal_calls(first: int, stop: int, S: int, offset: int, prefix: int) -> Iterator[Call]:
    """Queries that see all keys up to where they stand."""
    if not prefix and first + offset == 0 and 0 < stop - first <= S:
        yield Call(slice(first, stop), slice(0, stop - first), is_causal=True)
        return
    if not prefix and stop - first > 1 and 0 < first + offset <= S - (stop - first):
        # A chunk of a long prompt: what all of it sees, and its own causal square. Nothing has to be drawn.
        yield Call(slice(first, stop), slice(0, first + offset))
        yield Call(slice(first, stop), slice(first + offset, stop + offset), is_causal=True, is_more=True)
        return
    step = min(max(DRAWN_CELLS // S, SMALLEST_TILE), QUERY_BLOCK)
    for start in range(first, stop, step):
        end = min(start + step, stop)
        high = min(S, max(end + offset, prefix))
        sees_all = high <= max(start + offset + 1, prefix)
        tile = None if sees_all else Mask(prefix=prefix, offset=start + offset)
        yield Call(slice(start, end), slice(0, high), mask=tile)


def _window_calls(first: int, stop: int, S: int, offset: int, mask: Mask) -> Iterator[Call]:
    """Queries in tiles: those deep enough in the row see alike and go together, the first and the last few alone."""
    window = mask.window
    assert window is not None and isinstance(mask.prefix, int)
    # Keys at the row's start that whoever stands behind them sees.
    head = min(max(mask.prefix, mask.first_tokens), S)
    step = min(max(window, SMALLEST_TILE), QUERY_BLOCK)
    # One key more than the first query of a tile sees: kernels take even widths faster. A single query does without.
    reach = window if stop - first > 1 else window - 1
    start = first
    while start < stop:
        low = start + offset - reach
        if low >= head:
            tiles = max(1, min(stop - start, S - offset - start) // step)
            end = min(start + tiles * step, stop)
            keys = slice(min(low, S), max(min(S, end + offset), min(low, S)))
            tile = Mask(window=window, first_tokens=head, offset=head + reach)
        else:
            tiles, end = 1, min(start + step, stop)
            keys = slice(0 if head else max(0, low), min(S, max(end + offset, mask.prefix)))
            place = start + offset - keys.start
            tile = Mask(window=window, prefix=mask.prefix, first_tokens=mask.first_tokens, offset=place)
        yield _window_call(Call(slice(start, end), keys, mask=tile, tiles=tiles, head=head if low >= head else 0))
        start = end


def _window_call(call: Call) -> Call:
    """The same call without its drawing where a kernel needs none."""
    assert call.mask is not None and call.mask.window is not None and call.mask.offset is not None
    T, S, window, offset = call.tile_queries, call.head + call.tile_keys, call.mask.window, call.mask.offset
    if offset >= S - 1 and max(T - 1 + offset - window + 1, 0) <= call.head:
        return Call(call.queries, call.keys, tiles=call.tiles, head=call.head)
    if offset == 0 and T == S and window >= T and not call.mask.prefix:
        return Call(call.queries, call.keys, is_causal=True)
    return call


def forward_rows(  # noqa: PLR0917
    kernel: Kernel, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, E), log-sum-exp (B, H, T)) of rows that are one document each."""
    (B, T, H), S = q_BTHC.shape[:3], k_BSGC.shape[1]
    todo = tuple(calls(T, S, mask))
    if len(todo) == 1 and todo[0].queries == slice(0, T):
        return _forward_call(kernel, todo[0], q_BTHC, k_BSGC, v_BSGE, scale)
    out_BTHE = q_BTHC.new_zeros(B, T, H, v_BSGE.shape[-1])
    lse_BHT = q_BTHC.new_full((B, H, T), float("-inf"), dtype=torch.promote_types(q_BTHC.dtype, torch.float32))
    for call in todo:
        out, lse = _forward_call(kernel, call, q_BTHC, k_BSGC, v_BSGE, scale)
        if call.is_more:
            out, lse = merged(out_BTHE[:, call.queries], lse_BHT[:, :, call.queries], out, lse)
        out_BTHE[:, call.queries], lse_BHT[:, :, call.queries] = out, lse
    return out_BTHE, lse_BHT


def merged(one_BTHE: Tensor, one_BHT: Tensor, other_BTHE: Tensor, other_BHT: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over two sets of keys from those over each, of which every query sees some."""
    lse_BHT = torch.logaddexp(one_BHT, other_BHT)
    share_BTH1 = (other_BHT - lse_BHT).exp().transpose(1, 2)[..., None]
    one, other = one_BTHE.to(lse_BHT.dtype), other_BTHE.to(lse_BHT.dtype)
    return torch.lerp(one, other, share_BTH1).to(one_BTHE.dtype), lse_BHT


def _forward_call(  # noqa: PLR0917
    kernel: Kernel, call: Call, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGE: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = cut_queries(q_BTHC, call), cut_keys(k_BSGC, call), cut_keys(v_BSGE, call)
    out, lse = kernel.forward(q, k, v, drawn(call, q), call.is_causal, scale)
    return join_tiles(out, call), join_tiles(lse.transpose(1, 2), call).transpose(1, 2)


def backward_rows(  # noqa: PLR0917
    kernel: Kernel,
    grad_BTHE: Tensor,
    q_BTHC: Tensor,
    k_BSGC: Tensor,
    v_BSGE: Tensor,
    out_BTHE: Tensor,
    lse_BHT: Tensor,
    mask: Mask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of rows that are one document each."""
    T, S = q_BTHC.shape[1], k_BSGC.shape[1]
    todo = tuple(calls(T, S, mask))
    tensors = (grad_BTHE, q_BTHC, k_BSGC, v_BSGE, out_BTHE, lse_BHT)
    if len(todo) == 1 and (todo[0].queries, todo[0].keys, todo[0].tiles) == (slice(0, T), slice(0, S), 1):
        return _backward_call(kernel, todo[0], tensors, scale)
    # fp32: many calls may add to the gradient of one key.
    dtype = torch.promote_types(q_BTHC.dtype, torch.float32)
    dq_BTHC, dk_BSGC, dv_BSGE = (torch.zeros_like(x, dtype=dtype) for x in (q_BTHC, k_BSGC, v_BSGE))
    for call in todo:
        dq, dk, dv = _backward_call(kernel, call, tensors, scale)
        dq_BTHC[:, call.queries] += join_tiles(dq, call)
        add_keys(dk_BSGC, dk, call)
        add_keys(dv_BSGE, dv, call)
    return dq_BTHC.to(q_BTHC.dtype), dk_BSGC.to(k_BSGC.dtype), dv_BSGE.to(v_BSGE.dtype)


def _backward_call(
    kernel: Kernel, call: Call, tensors: tuple[Tensor, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_BTHE, q_BTHC, k_BSGC, v_BSGE, out_BTHE, lse_BHT = tensors
    grad, q, out, lse_BTH = (cut_queries(x, call) for x in (grad_BTHE, q_BTHC, out_BTHE, lse_BHT.transpose(1, 2)))
    k, v = cut_keys(k_BSGC, call), cut_keys(v_BSGE, call)
    return kernel.backward(grad, q, k, v, out, lse_BTH.transpose(1, 2), drawn(call, q), call.is_causal, scale)


def cut_queries(x_BT: Tensor, call: Call) -> Tensor:
    """The queries of a call, a tile a row."""
    if call.tiles == 1:
        return x_BT[:, call.queries]
    return x_BT[:, call.queries].unflatten(1, (call.tiles, call.tile_queries)).flatten(0, 1)


def join_tiles(x_PT: Tensor, call: Call) -> Tensor:
    """Tiles one behind the other again."""
    return x_PT if call.tiles == 1 else x_PT.unflatten(0, (-1, call.tiles)).flatten(1, 2)


def cut_keys(x_BS: Tensor, call: Call) -> Tensor:
    """The keys of a call, a tile a row, each with the head before it."""
    if call.tiles == 1 and not call.head:
        return x_BS[:, call.keys]
    own_BPL = x_BS[:, call.keys].unfold(1, call.tile_keys, call.tile_queries).movedim(-1, 2)
    if call.head:
        head_BPL = x_BS[:, None, : call.head].expand(-1, call.tiles, *[-1] * (x_BS.ndim - 1))
        own_BPL = torch.cat((head_BPL, own_BPL), dim=2)
    return own_BPL.flatten(0, 1)


def add_keys(total_BS: Tensor, part_PL: Tensor, call: Call) -> None:
    """What `cut_keys` handed out, added up where it came from."""
    part_BPL = part_PL.unflatten(0, (-1, call.tiles))
    if call.head:
        total_BS[:, : call.head] += part_BPL[:, :, : call.head].sum(dim=1, dtype=total_BS.dtype)
    own_BPL = part_BPL[:, :, call.head :].movedim(2, -1)
    # Keys of one tile overlap those of the next; pieces of a tile's length do not.
    for start in range(0, call.tile_keys, call.tile_queries):
        piece = own_BPL[..., start : start + call.tile_queries]
        room = total_BS[:, call.keys.start + start : call.keys.stop]
        room.unfold(1, piece.shape[-1], call.tile_queries)[:, : call.tiles].add_(piece)


def drawn(call: Call, like: Tensor) -> Tensor | None:
    """0 where a query of a tile looks and -inf elsewhere, (T, S), of the dtype and on the device of `like`."""
    if call.mask is None:
        return None
    T, S = call.tile_queries, call.head + call.tile_keys
    draw = _draw if T * S <= CACHED_CELLS else _draw.__wrapped__
    return draw(call.mask, T, S, like.dtype, like.device)


@lru_cache(maxsize=32)
def _draw(mask: Mask, T: int, S: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Rows start at multiples of 16 cells, as CUDA kernels demand.
    bias_TS = torch.full((T, -(-S // 16) * 16), float("-inf"), dtype=dtype, device=device)[:, :S]
    return bias_TS.masked_fill_(mask.dense(1, T, S, device)[0], 0.0)
