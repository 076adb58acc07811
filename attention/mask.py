"""Mask: which keys a query may see, described once as data and drawn only where a backend needs the drawing."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import ClassVar, NamedTuple, Self

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
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if any(not isinstance(length, int) for length in self.lengths):
            raise Refusal(f"documents of lengths {_short(self.lengths)}: lengths are whole numbers of tokens")
        if not self.lengths or min(self.lengths) < 1:
            raise Refusal(
                f"documents of lengths {_short(self.lengths)}: every document needs at least one token; drop empty ones"
            )

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor | Sequence[int]) -> "Documents":
        """From FlashAttention's starts of all documents and the end of the last; empty documents are left out.

        A tensor on a GPU is waited for: give a sequence, or keep the Documents, where that matters.
        """
        return cls(tuple(length for length in lengths_between(cu_seqlens) if length))

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

    def places(self, device: torch.device | str) -> "Places":
        """(document, place within it) of each flat token, (N,) each."""
        key = ("places", str(device))
        if key not in self._on_device:
            lengths = np.asarray(self.lengths, dtype=np.int64)
            document = np.repeat(np.arange(len(lengths)), lengths)
            place = np.arange(self.num_tokens) - (np.cumsum(lengths) - lengths)[document]
            self._on_device[key] = Places(*(torch.from_numpy(x).to(device) for x in (document, place)))
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


class Places(NamedTuple):
    """Where tokens stand: their document, and the place within it; of like shapes."""

    document: Tensor
    place: Tensor


def round_up(lengths: np.ndarray) -> np.ndarray:
    """The next length of the ladder 1..8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...: at most a quarter longer."""
    step = 2 ** np.maximum(np.floor(np.log2(np.maximum(lengths - 1, 1))).astype(np.int64) - 2, 0)
    return -(-lengths // step) * step


def lengths_between(cu_seqlens: Tensor | Sequence[int], name: str = "cu_seqlens") -> list[int]:
    """The lengths of documents, of empty ones too, from 0 and where each of them ends."""
    if not isinstance(cu_seqlens, Tensor | Sequence):
        raise Refusal(f"{name} is of type {type(cu_seqlens).__name__}; give a sequence or a tensor of whole numbers")
    ends = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if any(not isinstance(end, int) for end in ends):
        raise Refusal(f"{name}={_short(ends)}: give whole numbers of tokens")
    if ends[:1] != [0] or any(after < before for before, after in pairwise(ends)):
        raise Refusal(f"{name}={_short(ends)}: give 0, then where each document ends, none before the one before it")
    return [after - before for before, after in pairwise(ends)]


def _short(numbers: Sequence[int]) -> str:
    return f"{tuple(numbers)}" if len(numbers) <= 8 else f"({', '.join(map(str, numbers[:8]))}, ...)"


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see: its own document's, of those what all of the rest allows. Data; backends draw it.

    Query t stands at key t + offset, with documents counted within its document; left out, the last query stands at
    the last key (bottom-right), of each document where there are documents.
    """

    is_split: ClassVar[bool] = False
    """Whether the tokens lie on several ranks: a subclass on a higher floor says so."""

    is_causal: bool = True
    """None after itself."""
    window: int | None = None
    """How many tokens a query sees back, itself included."""
    documents: Documents | None = None
    """Left out: a row is one document."""
    key_documents: Documents | None = None
    """The keys' documents where they are not as long as the queries'; as many, in the same order."""
    prefix: int | tuple[int, ...] = 0
    """So many first keys of each document (one number for each, or for all) are seen by all of its queries, whatever
    window there is: a prefix that sees itself both ways."""
    first_tokens: int = 0
    """So many first keys of each document stay in view of a window that has moved on (attention sinks)."""
    offset: int | None = None
    """Where a row is one document and a tile of a larger mask is meant: the key that query 0 stands at, any integer."""

    def __post_init__(self) -> None:
        self._check_types()
        if self.window is not None and self.window < 1:
            raise Refusal(f"window={self.window}: a token sees at least itself; use 1 or more, or leave it out")
        if self.window is not None and not self.is_causal:
            raise Refusal(f"window={self.window} looks back only; use is_causal=True or leave the window out")
        if self.offset is not None and self.documents is not None:
            raise Refusal(f"offset={self.offset} is for rows that are one document; leave out documents or offset")
        if self.prefixes and min(self.prefixes) < 0:
            raise Refusal(f"prefix={self.prefix} counts tokens; use 0 or more")
        if any(self.prefixes) and not self.is_causal:
            raise Refusal(f"prefix={self.prefix} is seen both ways already with is_causal=False; leave one of them out")
        if self.first_tokens < 0:
            raise Refusal(f"first_tokens={self.first_tokens} counts tokens; use 0 or more")
        if self.key_documents is None:
            return
        if self.documents is None:
            raise Refusal("key_documents are the keys' side of documents; give the queries' documents too")
        if len(self.documents.lengths) != len(self.key_documents.lengths):
            raise Refusal(
                f"documents and key_documents must be as many, not {len(self.documents.lengths)} and "
                f"{len(self.key_documents.lengths)}; leave out documents that have no queries or no keys"
            )

    def _check_types(self) -> None:
        counts = {"window": self.window, "first_tokens": self.first_tokens, "offset": self.offset}
        for name, count in (*counts.items(), *(("prefix", number) for number in self.prefixes)):
            if count is not None and not isinstance(count, int):
                raise Refusal(f"{name}={count!r} must be a whole number of tokens")
        for name, documents in (("documents", self.documents), ("key_documents", self.key_documents)):
            if documents is not None and not isinstance(documents, Documents):
                raise Refusal(f"{name} is of type {type(documents).__name__}; give Documents(lengths)")

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The prefix as a tuple: one number for all documents, or one for each."""
        return self.prefix if isinstance(self.prefix, tuple) else (self.prefix,)

    def within(self, window: int | None) -> Self:
        """The same mask with a window no wider than `window`."""
        if window is None or (self.window is not None and self.window <= window):
            return self
        return replace(self, window=window)

    def check(self, num_rows: int, num_queries: int, num_keys: int) -> None:
        """Refuse shapes that the documents do not fit."""
        count = num_rows if self.documents is None else len(self.documents.lengths)
        if isinstance(self.prefix, tuple) and len(self.prefix) != count:
            raise Refusal(f"prefix={_short(self.prefix)} has {len(self.prefix)} numbers; give one, or {count}")
        if self.documents is None:
            return
        if self.key_documents is None and num_queries != num_keys:
            raise Refusal(
                f"documents need as many queries as keys, not T={num_queries} and S={num_keys}; "
                "leave them out or give key_documents too"
            )
        self.documents.check_rows(num_rows, num_queries)
        if self.key_documents is not None:
            self.key_documents.check_rows(num_rows, num_keys)

    def dense(self, B: int, T: int, S: int, device: torch.device | str) -> Tensor:
        """The mask drawn in full: bool (B, T, S), true where query t sees key s. For small shapes only."""
        queries, keys = self.places(B, T, S, device)
        return self.sees(Places(*(x[..., None] for x in queries)), Places(*(x[:, None] for x in keys)))

    def sees(self, queries: Places, keys: Places) -> Tensor:
        """Whether each query sees each key, for shapes that broadcast: the one definition of this mask."""
        seen = queries.document == keys.document
        if not self.is_causal:
            return seen
        in_view = keys.place <= queries.place
        if self.window is not None:
            near = keys.place > queries.place - self.window
            in_view = in_view & ((near | (keys.place < self.first_tokens)) if self.first_tokens else near)
        if any(self.prefixes):
            in_view = in_view | (keys.place < self._prefix_of(queries.document))
        return seen & in_view

    def places(self, B: int, T: int, S: int, device: torch.device | str) -> tuple[Places, Places]:
        """Where the queries (B, T) and the keys (B, S) stand, a query by the key it stands at; refuses misfits."""
        self.check(B, T, S)
        if self.documents is None:
            offset = S - T if self.offset is None else self.offset
            row_B1 = torch.arange(B, device=device)[:, None]
            query_T, key_S = torch.arange(T, device=device) + offset, torch.arange(S, device=device)
            return Places(row_B1.expand(B, T), query_T.expand(B, T)), Places(row_B1.expand(B, S), key_S.expand(B, S))
        document_N, place_N = self.documents.places(device)
        queries = Places(document_N.view(B, T), place_N.view(B, T))
        if self.key_documents is None:
            return queries, queries
        gains = np.subtract(self.key_documents.lengths, self.documents.lengths)
        shifted = Places(queries.document, queries.place + torch.from_numpy(gains).to(device)[queries.document])
        return shifted, Places(*(x.view(B, S) for x in self.key_documents.places(device)))

    def _prefix_of(self, document: Tensor) -> Tensor | int:
        if not isinstance(self.prefix, tuple):
            return self.prefix
        return torch.tensor(self.prefix, device=document.device)[document]
