"""Tasks made of random tokens: samples that are pure functions of their keys, for training and for asking alike."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Samples:
    """S samples of T tokens, ids below the task's vocabulary; both arrays int64.

    labels_ST: what is asked at each place; NO_TARGET where nothing is. Not always the token that follows.
    """

    tokens_ST: np.ndarray
    labels_ST: np.ndarray
