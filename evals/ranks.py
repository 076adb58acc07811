"""Rows shared out among the ranks of a run, so that each is read once, and the scores brought together again."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from parallel.world import World


@dataclass(frozen=True)
class Ranks:
    """Who reads which rows."""

    world: World = field(default_factory=World)
    together: int = 1
    """So many neighbours read the same rows at the same time: those that hold experts together have to."""

    @property
    def size(self) -> int:
        """How many read rows of their own."""
        return self.world.size // self.together

    def mine(self, groups_G: np.ndarray) -> np.ndarray:
        """The numbers of the rows that this rank reads. groups_G: rows of one number stay on one rank.

        Groups are dealt out by size, the largest first, to whoever has the fewest rows: rows are of one length.
        """
        if self.size == 1:
            return np.arange(len(groups_G))
        names, sizes = np.unique(groups_G, return_counts=True)
        load_W = np.zeros(self.size, dtype=np.int64)
        owner_of = {}
        for place in np.argsort(-sizes, kind="stable"):
            owner_of[names[place]] = owner = int(load_W.argmin())
            load_W[owner] += sizes[place]
        me = self.world.rank // self.together
        return np.flatnonzero([owner_of[name] == me for name in groups_G])

    def sum(self, values: np.ndarray, device: torch.device) -> np.ndarray:
        """The sum over all that read rows of their own; of neighbours that read the same, one counts."""
        if self.world.size == 1:
            return values
        counts = self.world.rank % self.together == 0
        tensor: Tensor = torch.from_numpy(values if counts else np.zeros_like(values)).to(device)
        return self.world.sum(tensor).cpu().numpy()
