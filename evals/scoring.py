"""How a model is asked: rows of tokens through one teacher-forced forward pass, and the cells that come back."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attention.mask import Documents, Mask
from data.tokenizer import Tokenizer
from evals.prefixes import batches, find_families
from evals.ranks import Ranks
from model.loss import IGNORED, greedy, token_losses
from model.prefill import new_cache, read
from model.transformer import Transformer
from settings import Refusal, nearest

LOGITS_CHUNK = 1024
"""Rows whose logits exist at once: at a vocabulary of 128K this is half a gigabyte in fp32."""


@dataclass(frozen=True)
class Materials:
    """What every task needs beside the model: the text held out of training, and where and how to compute."""

    tokenizer: Tokenizer
    held_out: Mapping[str, np.ndarray]
    """Held-out tokens of each source, documents joined by the tokenizer's end of text."""
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    """A fresh context of the run's precision."""
    tokens_per_forward: int = 16_384
    """Rows are forwarded together up to this many tokens; a longer row goes alone."""
    ranks: Ranks = field(default_factory=Ranks)
    """Those that share out the rows; every one of them asks the same, in the same order."""


@dataclass(frozen=True)
class Cell:
    """One measured number: a row of `evals.jsonl`."""

    task: str
    length: int
    depth: float | None
    score: float
    count: int
    """How many samples (needle) or tokens (the rest) the score is a mean over."""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.row(
            0, 0
        )  # a field that the row has already is our mistake: found where it is made, not when it is written

    def row(self, step: int, tokens: int) -> dict[str, Any]:
        """The cell as one flat JSON object, stamped with the step and the tokens trained on so far."""
        stamped = {"step": step, "tokens": tokens, "task": self.task, "length": self.length, "depth": self.depth}
        named = {**stamped, "score": self.score, "count": self.count}
        hidden = named.keys() & self.extra.keys()
        assert not hidden, f"{self.task}: extra fields hide {hidden}"
        return {**named, **self.extra}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Cell":
        """The cell of one row of `evals.jsonl`, without its stamp; a score that was no number is NaN again."""
        own = {name: row[name] for name in ("task", "length", "depth", "score", "count")}
        own["score"] = math.nan if own["score"] is None else own["score"]
        extra = {key: value for key, value in row.items() if key not in own and key not in ("step", "tokens")}
        return cls(**own, extra=extra)


@dataclass(frozen=True)
class Rows:
    """Rows of one length to be read by the model, and the next token asked of it at each position."""

    tokens_BT: np.ndarray
    labels_BT: np.ndarray
    """The token after each position; -100 where nothing is asked."""
    end_of_text: int | None = None
    """Where a row is cut into documents that do not see each other, as in training; None: a row is one document."""

    def __post_init__(self) -> None:
        assert self.tokens_BT.shape == self.labels_BT.shape, (
            f"{self.tokens_BT.shape} tokens, {self.labels_BT.shape} labels"
        )

    @property
    def is_asked_BT(self) -> np.ndarray:
        return self.labels_BT != IGNORED

    def of(self, rows_B: np.ndarray) -> "Rows":
        """Some of the rows."""
        return replace(self, tokens_BT=self.tokens_BT[rows_B], labels_BT=self.labels_BT[rows_B])


@contextmanager
def evaluating(model: nn.Module, materials: Materials) -> Iterator[None]:
    """Evaluation mode in the run's precision, no gradients; every module gets its own mode back afterwards."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Not inference_mode: tables that the model keeps (rotary, documents) must stay usable for training.
        with torch.no_grad(), materials.autocast():
            yield
    finally:
        for module, mode in was_training.items():
            module.training = mode


def forwards(model: nn.Module, materials: Materials, rows: Rows) -> Iterator[tuple[slice, Tensor, Sequence[Any]]]:
    """Read the rows in micro-batches: (which rows, hidden_BTD, routing of each layer); use it inside `evaluating`."""
    num_rows, length = rows.tokens_BT.shape
    step = max(1, materials.tokens_per_forward // length)
    for start in range(0, num_rows, step):
        part = slice(start, min(start + step, num_rows))
        tokens = rows.tokens_BT[part]
        positions, documents = split_documents(tokens, rows.end_of_text)
        positions_BT = None if positions is None else to_device(positions, materials.device)
        mask = Mask(documents=documents)
        hidden_BTD, stats = model(to_device(tokens, materials.device), positions_BT, mask)
        # A model that reads less than it was given would be scored on a prompt it never saw.
        assert hidden_BTD.shape[:2] == tokens.shape, f"gave {tokens.shape} tokens, got {tuple(hidden_BTD.shape)} back"
        yield part, hidden_BTD, stats


@dataclass(frozen=True)
class Reading:
    """What a model made of a stretch of some rows."""

    rows_B: np.ndarray
    """Which rows."""
    start: int
    """The place of the stretch in each of them."""
    hidden_BTD: Tensor


def readings(model: nn.Module, materials: Materials, rows: Rows) -> Iterator[Reading]:
    """Every place of every row, in stretches; use it inside `evaluating`.

    A decoder reads once what rows have in common, and a row of more than `tokens_per_forward` in chunks of that many.
    """
    length = rows.tokens_BT.shape[1]
    families = find_families(rows.tokens_BT) if shares_prefixes(model, rows) else []
    has_shared = any(family.shared for family in families)
    if not families or (not has_shared and length <= materials.tokens_per_forward):
        for part, hidden_BTD, _ in forwards(model, materials, rows):
            yield Reading(np.arange(part.start, part.stop), 0, hidden_BTD)
        return
    assert isinstance(model, Transformer)
    for rows_BM, shared in batches(families, max(1, materials.tokens_per_forward // length)):
        yield from _read_together(model, materials, rows, rows_BM, shared)


def shares_prefixes(model: nn.Module, rows: Rows) -> bool:
    """Whether what rows have in common is read once: by a decoder, in rows that are no packed documents.

    These begin alike by chance alone, and nothing may be read on from a document before.
    """
    return isinstance(model, Transformer) and rows.end_of_text is None


def _read_together(
    model: Transformer, materials: Materials, rows: Rows, rows_BM: np.ndarray, shared: int
) -> Iterator[Reading]:
    """Families of M rows: the tokens that each family shares, then the rest of its rows one after the other."""
    length = rows.tokens_BT.shape[1]
    chunk = max(1, materials.tokens_per_forward // len(rows_BM))
    cache = new_cache(model, len(rows_BM), length, min(chunk, length), reach=length - shared)
    beginning_BT = to_device(rows.tokens_BT[rows_BM[:, 0], :shared], materials.device)
    for start, hidden_BTD in read(model, beginning_BT, cache, chunk):
        for rows_B in rows_BM.T:
            yield Reading(rows_B, start, hidden_BTD)
    for rows_B in rows_BM.T:
        cache.trim(shared)
        rest_BT = to_device(rows.tokens_BT[rows_B, shared:], materials.device)
        for start, hidden_BTD in read(model, rest_BT, cache, chunk):
            yield Reading(rows_B, shared + start, hidden_BTD)


def score_rows(model: nn.Module, materials: Materials, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """What the model says at every asked position: (greedy_BT token ids, logprob_BT of the label in nats).

    Logits are made at the asked positions alone; the others hold -1 and NaN. Ranks read different rows, those that
    begin alike on one rank, and all of them get all scores.
    """
    ranks = materials.ranks
    if ranks.size == 1:
        return _score(model, materials, rows)
    groups_B = np.arange(len(rows.tokens_BT))
    if shares_prefixes(model, rows):
        for family in find_families(rows.tokens_BT):
            groups_B[list(family.rows)] = family.rows[0]
    mine = ranks.mine(groups_B)
    greedy_BT, logprob_BT = np.full_like(rows.labels_BT, -1), np.full(rows.labels_BT.shape, np.nan, dtype=np.float32)
    if len(mine):
        greedy_BT[mine], logprob_BT[mine] = _score(model, materials, rows.of(mine))
    is_asked_BT = rows.is_asked_BT
    is_mine_N = np.isin(np.nonzero(is_asked_BT)[0], mine)
    for scores_BT in (greedy_BT, logprob_BT):
        # A number that another rank has read is zero here; one that is no number stays none.
        scores_BT[is_asked_BT] = ranks.sum(np.where(is_mine_N, scores_BT[is_asked_BT], 0), materials.device)
    return greedy_BT, logprob_BT


def _score(model: nn.Module, materials: Materials, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """`score_rows` by this rank alone."""
    greedy_BT = np.full(rows.labels_BT.shape, -1, dtype=np.int64)
    logprob_BT = np.full(rows.labels_BT.shape, np.nan, dtype=np.float32)
    with evaluating(model, materials):
        head_VD: Tensor = model.head_weight  # type: ignore[assignment]  # torch types every attribute as Tensor | Module
        for reading in readings(model, materials, rows):
            stop = reading.start + reading.hidden_BTD.shape[1]
            is_asked_BT = rows.is_asked_BT[reading.rows_B, reading.start : stop]
            if not is_asked_BT.any():
                continue
            row_N, place_N = np.nonzero(is_asked_BT)
            asked = reading.rows_B[row_N], reading.start + place_N
            hidden_ND = reading.hidden_BTD.flatten(0, 1)[to_device(np.flatnonzero(is_asked_BT), materials.device)]
            labels_N = to_device(rows.labels_BT[asked], materials.device)
            greedy_BT[asked] = greedy(hidden_ND, head_VD, LOGITS_CHUNK).cpu().numpy()
            logprob_BT[asked] = -token_losses(hidden_ND, head_VD, labels_N, LOGITS_CHUNK).cpu().numpy()
    return greedy_BT, logprob_BT


def split_documents(tokens_BT: np.ndarray, end_of_text: int | None) -> tuple[np.ndarray | None, Documents | None]:
    """(position of each token in its document, the documents in row-major order); (None, None) if rows are whole."""
    is_last_BT = np.zeros(tokens_BT.shape, dtype=bool) if end_of_text is None else tokens_BT == end_of_text
    if not is_last_BT[:, :-1].any():
        return None, None
    is_last_BT[:, -1] = True
    ends = np.flatnonzero(is_last_BT) + 1
    lengths = np.diff(ends, prepend=0)
    positions = np.arange(tokens_BT.size) - np.repeat(ends - lengths, lengths)
    return positions.reshape(tokens_BT.shape), Documents(tuple(lengths.tolist()))


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)


def sources_of(materials: Materials, names: Sequence[str], key: str) -> list[str]:
    """The named sources, or all that have held-out text; refuses what is not there."""
    for name in names:
        if name not in materials.held_out:
            raise Refusal(f"{key}={name!r} has no held-out text{nearest(name, list(materials.held_out))}")
    if not materials.held_out:
        raise Refusal(
            f"{key}: no source has held-out text; add one to data.sources or take the task out of evals.tasks"
        )
    return list(names) or list(materials.held_out)
