"""Greedy continuations of many prompts at once, of one length or of several: what they share is read once."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from evals.prefixes import batches, find_families
from evals.scoring import LOGITS_CHUNK, Materials, evaluating, to_device
from model.loss import greedy
from model.prefill import new_cache, prefill
from model.transformer import Transformer

CACHES_PER_FORWARD = 4
"""So many times the tokens of one forward are held in caches at once: a step takes as long for few rows as for many."""


def continue_greedily(
    model: nn.Module, materials: Materials, prompts: Sequence[np.ndarray], max_new_tokens: Sequence[int]
) -> list[np.ndarray]:
    """What the model puts after each prompt (P,) of at least one token: at most its `max_new_tokens`, and nothing from
    end_of_text on.

    Rows of different lengths go together: one that is still inside its prompt is fed its prompt, as no cache could
    hold padding between the two. Ranks continue different prompts, and all of them get all continuations.
    """
    ranks, most = materials.ranks, max(max_new_tokens, default=0)
    if ranks.size == 1:
        return _continue(model, materials, prompts, max_new_tokens)
    mine = ranks.mine(alike(prompts, most))
    written = _continue(model, materials, [prompts[row] for row in mine], [max_new_tokens[row] for row in mine])
    # What another rank has written is zero here: a sum brings all together.
    counts_B, tokens_BT = np.zeros(len(prompts), dtype=np.int64), np.zeros((len(prompts), most), dtype=np.int64)
    for row, tokens in zip(mine, written, strict=True):
        counts_B[row], tokens_BT[row, : len(tokens)] = len(tokens), tokens
    counts_B, tokens_BT = (ranks.sum(array, materials.device) for array in (counts_B, tokens_BT))
    return [tokens[:count] for tokens, count in zip(tokens_BT, counts_B, strict=True)]


def _continue(
    model: nn.Module, materials: Materials, prompts: Sequence[np.ndarray], max_new_tokens: Sequence[int]
) -> list[np.ndarray]:
    """`continue_greedily` by this rank alone."""
    found: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(prompts)
    with evaluating(model, materials):
        # A row that starts later is fed so many steps more: at most as many as are written anyway.
        for rows in staggered([len(prompt) for prompt in prompts], lambda _: max(max_new_tokens)):
            batch = Batch([prompts[row] for row in rows], [max_new_tokens[row] for row in rows])
            step = max(1, CACHES_PER_FORWARD * materials.tokens_per_forward // batch.tokens_BT.shape[1])
            for part, reader in readers(model, materials, batch, step):
                for row, tokens in zip(part, reader.run(), strict=True):
                    found[rows[row]] = tokens
    return found


def alike(prompts: Sequence[np.ndarray], most_apart: int) -> np.ndarray:
    """A number for each prompt: one and the same for those that are read together as they begin alike."""
    groups_B = np.arange(len(prompts))
    for rows in staggered([len(prompt) for prompt in prompts], lambda _: most_apart):
        shortest = min(len(prompts[row]) for row in rows)
        for family in find_families(np.stack([prompts[row][:shortest] for row in rows])):
            groups_B[[rows[member] for member in family.rows]] = rows[family.rows[0]]
    return groups_B


def staggered(lengths: Sequence[int], most_apart: Callable[[int], float]) -> Iterator[list[int]]:
    """Indices of lengths that are at most so far below the longest of them, longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    group: list[int] = []
    for index in order:
        if group and lengths[group[0]] - lengths[index] > most_apart(lengths[group[0]]):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


class Batch:
    """Prompts of nearly equal length, each with room behind it for what follows."""

    def __init__(self, prompts: Sequence[np.ndarray], max_new_tokens: Sequence[int]) -> None:
        self.lengths_B = np.array([len(prompt) for prompt in prompts])
        self.stops_B = self.lengths_B + np.array(max_new_tokens)
        self.tokens_BT = np.zeros((len(prompts), self.stops_B.max()), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            self.tokens_BT[row, : len(prompt)] = prompt


class Reader:
    """Rows on their way: at each place the next token is the prompt's, or the model's where the prompt is over."""

    def __init__(self, model: nn.Module, materials: Materials, batch: Batch, rows: np.ndarray) -> None:
        self.model, self.end_of_text = model, materials.tokenizer.end_of_text
        self.tokens_BT = to_device(batch.tokens_BT[rows], materials.device)
        self.lengths_B = to_device(batch.lengths_B[rows], materials.device)
        self.stops_B = to_device(batch.stops_B[rows], materials.device)
        self.place = int(batch.lengths_B.min())

    def run(self) -> list[np.ndarray]:
        """Each row's new tokens."""
        is_done_B = self.stops_B <= self.place
        while not is_done_B.all():
            next_B = greedy(self.read(), self.model.head_weight, LOGITS_CHUNK)  # type: ignore[arg-type]
            is_prompt_B = self.place < self.lengths_B
            self.tokens_BT[:, self.place] = torch.where(is_prompt_B, self.tokens_BT[:, self.place], next_B)
            self.place += 1
            is_done_B |= (self.stops_B <= self.place) | (~is_prompt_B & (next_B == self.end_of_text))
        return [
            until(tokens[length:stop], self.end_of_text)
            for tokens, length, stop in zip(
                self.tokens_BT.cpu().numpy(), self.lengths_B.tolist(), self.stops_B.tolist(), strict=True
            )
        ]

    def read(self) -> Tensor:
        """Hidden state (B, D) of the token before `place`, of anything that maps tokens to hidden states."""
        hidden_BTD, _ = self.model(self.tokens_BT[:, : self.place])
        return hidden_BTD[:, -1]


class CachedReader(Reader):
    """The same of a decoder, which reads each token once and a common beginning once for all rows."""

    def __init__(
        self, model: Transformer, materials: Materials, batch: Batch, rows_BM: np.ndarray, shared: int
    ) -> None:
        super().__init__(model, materials, batch, rows_BM.ravel())
        self.decoder, self.num_read = model, shared
        capacity, members = batch.tokens_BT.shape[1], rows_BM.shape[1]
        self.chunk = max(1, materials.tokens_per_forward // rows_BM.size)
        self.cache = new_cache(model, len(rows_BM), capacity, min(self.chunk, capacity))
        if shared:
            prefill(model, self.tokens_BT[::members, :shared], self.cache, self.chunk)
        if members > 1:
            self.cache = self.cache.repeat(members)

    def read(self) -> Tensor:
        """See Reader."""
        new_BT = self.tokens_BT[:, self.num_read : self.place]
        self.num_read = self.place
        return prefill(self.decoder, new_BT, self.cache, self.chunk)


def readers(model: nn.Module, materials: Materials, batch: Batch, step: int) -> Iterator[tuple[np.ndarray, Reader]]:
    """(rows, their reader), about `step` rows at a time."""
    if not isinstance(model, Transformer):
        for start in range(0, len(batch.lengths_B), step):
            rows = np.arange(start, min(start + step, len(batch.lengths_B)))
            yield rows, Reader(model, materials, batch, rows)
        return
    for rows_BM, shared in batches(find_families(batch.tokens_BT[:, : batch.lengths_B.min()]), step):
        yield rows_BM.ravel(), CachedReader(model, materials, batch, rows_BM, shared)


def until(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """The tokens before the first end_of_text."""
    ends = np.flatnonzero(tokens == end_of_text)
    return tokens[: ends[0]] if len(ends) else tokens
