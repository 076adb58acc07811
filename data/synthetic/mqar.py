"""Multi-query associative recall: pairs of key and value first, then each key again somewhere, to be answered there.

As in Zoology (Arora et al. 2023, arXiv 2312.04927; HazyResearch/zoology, zoology/data/multiquery_ar.py): keys from the
lower half of the vocabulary without 0, values from the upper half, each at most once; a key comes again after a gap
whose chance falls as a power of it; all places between hold tokens drawn from the whole vocabulary. The answer is asked
at the repeated key and stands nowhere behind it.
"""

import numpy as np

from data.order import counted, permute
from data.rows import NO_TARGET
from data.synthetic import Samples
from settings import Refusal

POWER = 0.01
"""The chance of a gap of n pairs of tokens goes as n ** (POWER - 1)."""
KEY, VALUE, GAP = 1 << 40, (1 << 40) + 1, 2 << 40
"""Where draws lie in a sample's stream, behind those of the tokens between."""
PARTS = 1 << 53


def mqar_samples(keys_S: np.ndarray, length: int, pairs: int, vocab_size: int = 8192, power: float = POWER) -> Samples:
    """Samples of exactly `length` tokens with so many pairs, each asked once. Raises Refusal for what does not fit."""
    check_mqar(length, pairs, vocab_size)
    half, order_P = vocab_size // 2, np.arange(pairs)
    many = (len(keys_S), pairs)
    names_SP = 1 + permute(np.broadcast_to(order_P, many), half - 1, counted(keys_S, KEY)[:, None])
    values_SP = half + permute(np.broadcast_to(order_P, many), vocab_size - half, counted(keys_S, VALUE)[:, None])
    tokens_ST = (counted(keys_S[:, None], np.arange(length)) % np.uint64(vocab_size)).astype(np.int64)
    tokens_ST[:, 0 : 2 * pairs : 2], tokens_ST[:, 1 : 2 * pairs : 2] = names_SP, values_SP
    asked_SP = 2 * pairs + 2 * draw_gaps(keys_S, (length - 2 * pairs) // 2, pairs, power)
    labels_ST = np.full_like(tokens_ST, NO_TARGET)
    np.put_along_axis(tokens_ST, asked_SP, names_SP, axis=1)
    np.put_along_axis(labels_ST, asked_SP, values_SP, axis=1)
    return Samples(tokens_ST, labels_ST)


def check_mqar(length: int, pairs: int, vocab_size: int) -> None:
    """Refuse pairs that neither the row nor the vocabulary has room for."""
    if pairs < 1 or 4 * pairs > length:
        raise Refusal(f"mqar: pairs={pairs} need {4 * max(pairs, 1)} tokens, to be told and asked; length is {length}")
    if pairs > vocab_size // 2 - 1:
        raise Refusal(
            f"mqar: pairs={pairs} need a vocabulary of {2 * pairs + 2}, half of it keys; it has {vocab_size} tokens"
        )


def draw_gaps(keys_S: np.ndarray, space: int, pairs: int, power: float = POWER) -> np.ndarray:
    """(S, P) different numbers below `space`, drawn one after the other by weight (n + 1) ** (power - 1).

    By Gumbel's race: log weight plus Gumbel noise, in falling order, is drawing without putting back.
    """
    drawn_SN = counted(keys_S[:, None], GAP + np.arange(space)) >> np.uint64(11)
    share_SN = (drawn_SN.astype(np.float64) + 0.5) / PARTS
    weight_N = (power - 1) * np.log(np.arange(1, space + 1))
    race_SN = weight_N - np.log(-np.log(share_SN))
    return np.argsort(-race_SN, axis=1, kind="stable")[:, :pairs]
