"""Copying random tokens: a block that comes twice, and examples of copying followed by a block to copy."""

import numpy as np

from data.order import counted
from data.rows import NO_TARGET
from data.synthetic import Samples
from settings import Refusal

ARROW, STOP = 0, 1
"""Between a block and its copy, and behind the copy; blocks hold neither."""


def repeated_blocks(keys_S: np.ndarray, lag: int, vocab_size: int) -> Samples:
    """A block of `lag` random tokens twice: 2 * lag tokens. All of the second is asked but its first, a free choice."""
    check_copy(lag, vocab_size)
    block_SN = (counted(keys_S[:, None], np.arange(lag)) % np.uint64(vocab_size)).astype(np.int64)
    tokens_ST = np.concatenate([block_SN, block_SN], axis=1)
    labels_ST = np.full_like(tokens_ST, NO_TARGET)
    labels_ST[:, lag:-1] = tokens_ST[:, lag + 1 :]
    return Samples(tokens_ST, labels_ST)


def copy_by_example(keys_S: np.ndarray, shots: int, block: int, vocab_size: int) -> Samples:
    """`shots` blocks each with its copy, then one more block whose copy is asked: (shots + 1) * (2 * block + 2) tokens.

    The row ends with what closes the last copy; that a copy ends is asked too.
    """
    check_copy(block, vocab_size)
    many = (len(keys_S), shots + 1, block)
    drawn_SKN = counted(keys_S[:, None], np.arange((shots + 1) * block)).reshape(many)
    block_SKN = 2 + (drawn_SKN % np.uint64(vocab_size - 2)).astype(np.int64)
    marks = [np.full((*many[:2], 1), mark) for mark in (ARROW, STOP)]
    tokens_ST = np.concatenate([block_SKN, marks[0], block_SKN, marks[1]], axis=2).reshape(len(keys_S), -1)
    labels_ST = np.full_like(tokens_ST, NO_TARGET)
    labels_ST[:, -block - 2 : -1] = tokens_ST[:, -block - 1 :]
    return Samples(tokens_ST, labels_ST)


def check_copy(block: int, vocab_size: int) -> None:
    """Refuse blocks too short to be told apart, and a vocabulary without anything to copy."""
    if block < 2 or vocab_size < 4:
        raise Refusal(f"copying needs blocks of 2 tokens and 4 different ones; got {block}, vocabulary={vocab_size}")
