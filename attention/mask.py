"""Mask: which keys a query may see, described once as data and drawn only where a backend needs the drawing."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from settings import Refusal


@dataclass(frozen=True)
class Group:
    """Documents that one attention call takes together: `count` of them, each gathered as `length` tokens."""

    count: int
    length: int


@dataclass(frozen=True)
class Grouping:
    """How flat tokens are gathered so that documents of like length stand together.

    source_P: the flat token each gathered slot holds; place_N: the slot each flat token went to. P >= N: where
    documents of nearly equal length share a group, the shorter ones are filled up with copies of their last token.
    """

    groups: tuple[Group, ...]
    source_P: Tensor
    place_N: Tensor


@dataclass(frozen=True)
class Documents:
    """Lengths of the documents of a batch, in the order of its flattened tokens; no document crosses a row."""

    lengths: tuple[int, ...]
    _on_device: dict[tuple[str, str], object] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise Refusal(
                f"documents of lengths {self.lengths[:8]}...: every document needs at least one token; drop empty ones"
            )

    @property
    def num_tokens(self) -> int:
        return self._ends[-1]

    @property
    def is_uniform(self) -> bool:
        """All of one length: a reshape then separates them."""
        return min(self.lengths) == max(self.lengths)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(accumulate(self.lengths))

    def check_rows(self, num_rows: int, row_length: int) -> None:
        """Refuse a batch whose rows these documents do not fill exactly."""
        if self.num_tokens != num_rows * row_length:
            raise Refusal(
                f"documents hold {self.num_tokens} tokens, the batch {num_rows} x {row_length}; they must be equal"
            )
        missing = set(range(row_length, self.num_tokens + 1, row_length)) - set(self._ends)
        if missing:
            raise Refusal(
                f"a document crosses the end of row {min(missing) // row_length - 1}; cut documents at row ends"
            )

    def cu_seqlens(self, device: torch.device | str) -> Tensor:
        """Starts of all documents and the end of the last: int32, (number of documents + 1,)."""
        key = ("cu_seqlens", str(device))
        if key not in self._on_device:
            self._on_device[key] = torch.tensor((0, *self._ends), dtype=torch.int32, device=device)
        return self._on_device[key]  # type: ignore[return-value]

    def groups(self, device: torch.device | str) -> list[tuple[int, Tensor]]:
        """(length, flat positions of its documents (D, length)) for each length there is, shortest first."""
        grouping = self.grouping(device, is_padded=False)
        slots = grouping.source_P.split([group.count * group.length for group in grouping.groups])
        return [(group.length, slot.view(-1, group.length)) for group, slot in zip(grouping.groups, slots, strict=True)]

    def grouping(self, device: torch.device | str, *, is_padded: bool) -> Grouping:
        """Gather documents by equal length or, padded, by nearly equal length, which makes fewer and larger groups."""
        key = ("padded" if is_padded else "exact", str(device))
        if key not in self._on_device:
            self._on_device[key] = self._build_grouping(device, is_padded)
        return self._on_device[key]  # type: ignore[return-value]

    def _build_grouping(self, device: torch.device | str, is_padded: bool) -> Grouping:
        lengths = np.asarray(self.lengths, dtype=np.int64)
        ends = np.cumsum(lengths)
        bins = round_up(lengths) if is_padded else lengths
        groups, sources = [], []
        for bin_ in np.unique(bins):
            members = np.flatnonzero(bins == bin_)
            longest = int(lengths[members].max())
            offsets = np.minimum(np.arange(longest), lengths[members, None] - 1)
            sources.append(((ends - lengths)[members, None] + offsets).ravel())
            groups.append(Group(len(members), longest))
        source = np.concatenate(sources)
        place = np.empty(int(ends[-1]), dtype=np.int64)
        # Written backwards: of the slots that hold copies of one token, the first is its place.
        place[source[::-1]] = np.arange(len(source))[::-1]
        return Grouping(tuple(groups), torch.from_numpy(source).to(device), torch.from_numpy(place).to(device))


def round_up(lengths: np.ndarray) -> np.ndarray:
    """The next length of the ladder 1..8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...: at most a quarter longer."""
    step = 2 ** np.maximum(np.floor(np.log2(np.maximum(lengths - 1, 1))).astype(np.int64) - 2, 0)
    return -(-lengths // step) * step


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see.

    is_causal: none after itself, the last query standing at the last key (bottom-right) where T != S.
    window: how many tokens it sees back, itself included. documents: it sees its own document alone; left out, a row is
    one document.
    """

    is_causal: bool = True
    window: int | None = None
    documents: Documents | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise Refusal(f"window={self.window}: a token sees at least itself; use 1 or more, or leave it out")
        if self.window is not None and not self.is_causal:
            raise Refusal(f"window={self.window} looks back only; use is_causal=True or leave the window out")

    def within(self, window: int | None) -> "Mask":
        """The same mask with a window no wider than `window`."""
        if window is None or (self.window is not None and self.window <= window):
            return self
        return replace(self, window=window)

    def check(self, num_rows: int, num_queries: int, num_keys: int) -> None:
        """Refuse shapes that the documents do not fit."""
        if self.documents is None:
            return
        if num_queries != num_keys:
            raise Refusal(
                f"documents need as many queries as keys, not T={num_queries} and S={num_keys}; drop one of them"
            )
        self.documents.check_rows(num_rows, num_queries)

    def dense(self, B: int, T: int, S: int, device: torch.device | str) -> Tensor:
        """The mask drawn in full: bool (B, T, S), true where query t sees key s. For small shapes only."""
        self.check(B, T, S)
        query_T1 = torch.arange(S - T, S, device=device)[:, None]
        key_S = torch.arange(S, device=device)
        seen_TS = torch.ones(T, S, dtype=torch.bool, device=device)
        if self.is_causal:
            seen_TS = key_S <= query_T1
        if self.window is not None:
            seen_TS = seen_TS & (key_S > query_T1 - self.window)
        if self.documents is None:
            return seen_TS.expand(B, T, S)
        lengths = torch.tensor(self.documents.lengths, device=device)
        document_BT = torch.arange(len(lengths), device=device).repeat_interleave(lengths).view(B, T)
        return seen_TS & (document_BT[:, :, None] == document_BT[:, None, :])
