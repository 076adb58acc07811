"""What evaluations need of a rank's memory, from the configuration alone: they are asked when a step is over."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from attention.cache import Room
from evals.continuing import CACHES_PER_FORWARD
from evals.scoring import LOGITS_CHUNK, Materials
from evals.suite import EvalsSettings, tasks_of
from model.cache_bytes import cache_bytes
from model.kept import FP32, Numbers, kept
from model.memory import Memory, states
from parallel.mesh import grid_of
from run.config import RunConfig

TOKENS: int = Materials.tokens_per_forward


@dataclass(frozen=True)
class Asked:
    """Bytes of one rank, beside weights, gradients and moments."""

    length: int
    """The longest prompt, in tokens."""
    cache: int
    """Keys and values: of one prompt so long, or of as many as are written on at once."""
    forward: int
    """One layer's activations and a chunk's logits."""
    whole: int
    """Of a model that ranks have cut: the copy that each of them is given."""

    def beside(self, needed: Memory) -> int:
        """All that a rank has then: the gradients of the last step are forgotten when the next begins."""
        return 2 * needed.weights + needed.moments + self.cache + self.forward + self.whole


def asked_of(config: RunConfig, vocab_size: int, num_ranks: int, numbers: Numbers) -> Asked | None:
    """None where a run is asked nothing."""
    lengths = [length for task in tasks_of(config.evals) for length in _lengths(config.evals, task)]
    if not lengths:
        return None
    model, longest = config.model, max(lengths)
    grid = grid_of(config.parallel, num_ranks)
    is_cut = grid.shard > 1 or grid.tensor > 1 or grid.expert > 1 or grid.pipeline > 1
    layers = (kept(model, layer, "none", numbers) for layer in range(model.num_layers))
    logits = LOGITS_CHUNK * vocab_size * 2 * FP32
    return Asked(
        length=longest,
        cache=max(cache_bytes(model, room) for room in _rooms(longest, numbers)),
        forward=max(layer.per_token for layer in layers) * TOKENS + logits,
        whole=states(model, vocab_size, config.optimizer.kind)[0] if is_cut else 0,
    )


def _rooms(longest: int, numbers: Numbers) -> Iterator[Room]:
    """Prompts scored, which window layers may have to go back in, and prompts that are written on."""
    dtype = torch.bfloat16 if numbers.is_cast else torch.float32
    scored, written = max(1, TOKENS // longest), max(1, CACHES_PER_FORWARD * TOKENS // longest)
    for rows, reach in ((scored, longest), (written, 0)):
        yield Room(rows, longest, min(max(1, TOKENS // rows), longest), reach, dtype=dtype)


def _lengths(evals: EvalsSettings, task: str) -> Iterator[int]:
    """The lengths that a task's table names."""
    table: Any = getattr(evals, task)
    for key in ("length", "lengths"):
        value = getattr(table, key, ())
        yield from (value,) if isinstance(value, int) else value
