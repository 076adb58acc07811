"""How much a model was asked."""

from collections.abc import Iterator
from contextlib import contextmanager

from model.transformer import Transformer


@contextmanager
def counted(model: Transformer) -> Iterator[list[int]]:
    """The numbers of tokens of every forward."""
    counts: list[int] = []
    hook = model.embedding.register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    yield counts
    hook.remove()
