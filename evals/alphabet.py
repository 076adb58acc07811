"""Tokens that tasks of random tokens are written in, whatever the tokenizer."""

import numpy as np

from data.synthetic import Samples
from evals.scoring import Materials, Rows
from settings import Refusal

TOKENS_COUNTED = 1_000_000
"""Of each source, at most: which tokens are common shows early."""


def alphabet(materials: Materials, size: int | None, key: str, at_most: int | None = None) -> np.ndarray:
    """(size,) token ids: those that are most frequent in the held-out text, so that the model has met each of them.

    Where no source holds text, the ids from 0 on, as tasks of random tokens are trained with. end_of_text is left out,
    for it parts documents. size: left out, all there are, up to `at_most`. Raises Refusal where there are fewer.
    """
    tokenizer = materials.tokenizer
    counts_V = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for tokens in materials.held_out.values():
        counts_V += np.bincount(np.asarray(tokens[:TOKENS_COUNTED]).astype(np.int64), minlength=len(counts_V))
    if not materials.held_out:
        counts_V[:] = 1
    counts_V[tokenizer.end_of_text] = 0
    known = np.argsort(-counts_V, kind="stable")[: np.count_nonzero(counts_V)]
    if size is not None and size > len(known):
        raise Refusal(f"{key}={size}: the held-out text has {len(known)} different tokens; lower it or leave it out")
    return known[: size or at_most]


def written_in(ids_V: np.ndarray, samples: Samples) -> Rows:
    """Samples of 0, 1, 2, ... as rows of these token ids."""
    is_asked = samples.labels_ST >= 0
    return Rows(ids_V[samples.tokens_ST], np.where(is_asked, ids_V[samples.labels_ST * is_asked], samples.labels_ST))
