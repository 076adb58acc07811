"""Induction heads: a mark stands once somewhere, and again at the end; what followed it is asked for.

As in Mamba (Gu and Dao 2023, arXiv 2312.00752, section 4.1 and table 11): 16 tokens in the vocabulary, one of them the
mark, the others drawn evenly. Which place holds the mark is as in the generator that Mamba's authors used before
(HazyResearch/safari, src/dataloaders/synthetics.py): any but the last ones, each as likely.
"""

import numpy as np

from data.order import counted
from data.rows import NO_TARGET
from data.synthetic import Samples
from settings import Refusal

MARK = 0
SHORTEST = 3
"""The mark, what follows it, and the mark again."""
PLACE = 1 << 40
"""Where the mark's draw lies in a sample's stream, behind those of its tokens."""


def induction_samples(keys_S: np.ndarray, length: int, vocab_size: int = 16) -> Samples:
    """Samples of exactly `length` tokens; only the last place is asked. Raises Refusal where a sample has no room."""
    if length < SHORTEST or vocab_size < SHORTEST:
        raise Refusal(
            f"induction needs {SHORTEST} tokens and a vocabulary of {SHORTEST} at least; got length={length}, "
            f"vocabulary={vocab_size}"
        )
    samples = np.arange(len(keys_S))
    drawn_ST = counted(keys_S[:, None], np.arange(length))
    tokens_ST = 1 + (drawn_ST % np.uint64(vocab_size - 1)).astype(np.int64)
    place_S = (counted(keys_S, PLACE) % np.uint64(length - 2)).astype(np.int64)
    tokens_ST[samples, place_S] = tokens_ST[:, -1] = MARK
    labels_ST = np.full_like(tokens_ST, NO_TARGET)
    labels_ST[:, -1] = tokens_ST[samples, place_S + 1]
    return Samples(tokens_ST, labels_ST)
