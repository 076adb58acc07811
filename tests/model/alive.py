"""Counts the bytes of all tensors that are alive: what a formula of memory is held to, on a CPU."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """`bytes` of the tensors that operations inside have made and nothing has let go of; `peak`: the most there were.

    What a kernel takes for itself and gives back before it returns is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """known: tensors that are not counted, as they were there before."""
        super().__init__()
        self.bytes = self.peak = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        self._storages.add(storage._cdata)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.bytes -= size
