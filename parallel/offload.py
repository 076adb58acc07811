"""Activations in host memory: what the backward pass will need leaves the device after a layer has used it, and is back
before that layer's turn comes again.

`torch.autograd.graph.save_on_cpu` moves weights and small tensors too, moves a tensor as often as it is saved, and
fetches each in the moment that it is wanted; so this is our own. Copies run on a stream of their own, on pinned memory.
"""

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.block import Block, Offload

SMALLEST = 1 << 20
"""Bytes: what is smaller stays, as it would gain little and be waited for as long."""
AT_ONCE = 1 << 29
"""Bytes that are on their way at a time at most, on either way: so many are on the device longer than they have to."""


class Trunk:
    """The memory of one tensor, here or in host memory, for all that has been saved of it."""

    def __init__(self, bytes_here: Tensor, before: "Trunk | None") -> None:
        self.here: Tensor | None = bytes_here
        self.ready: Any = None
        """When `here` holds what it should; None: it always did."""
        self.there = Tensor()
        self.before = None if before is None else weakref.ref(before)
        """What was saved before it, and so comes back after it."""
        self.num_uses = 0


@dataclass(frozen=True)
class View:
    """A tensor in a trunk."""

    trunk: Trunk
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class HostMemory:
    """See `model.block.Offload`; for one device, over all layers and micro-batches.

    streams: the device's module, such as torch.cuda. smallest, at_once: see above.
    """

    def __init__(self, device: torch.device, streams: Any, *, smallest: int = SMALLEST, at_once: int = AT_ONCE) -> None:
        self.device, self.smallest, self.at_once = device, smallest, at_once
        self.streams, self.stream = streams, streams.Stream()
        self.flights: deque[tuple[Any, Tensor, Trunk | None]] = deque()
        """(when it has landed, what must not be given up until then, the trunk if it leaves the device)"""
        self.last: weakref.ref[Trunk] | None = None
        # By memory and version: what several operations have saved leaves once. Gone when the memory is.
        self.known: weakref.WeakKeyDictionary[Any, tuple[int, weakref.ref[Trunk]]] = weakref.WeakKeyDictionary()

    def saving(self, module: nn.Module) -> torch.autograd.graph.saved_tensors_hooks:
        """Inside, what autograd saves leaves the device, but for the module's weights."""
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: self.pack(tensor, module), self.unpack)

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Let one tensor leave; the answer brings it back."""
        packed = self.pack(tensor, None)
        return lambda: self.unpack(packed)

    def pack(self, tensor: Tensor, module: nn.Module | None) -> Tensor | View:
        """The tensor itself, where it stays."""
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != self.device.type:
            return tensor
        if tensor.untyped_storage().nbytes() < self.smallest or (module is not None and is_weight(tensor, module)):
            return tensor
        trunk = self._trunk(tensor)
        trunk.num_uses += 1
        return View(trunk, tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def unpack(self, packed: Tensor | View) -> Tensor:
        """The tensor, on the device; those that were saved before it are sent for."""
        if isinstance(packed, Tensor):
            return packed
        trunk = packed.trunk
        bytes_here = self._fetch(trunk)
        if trunk.ready is not None:
            self.stream_at_work.wait_event(trunk.ready)
        self._fetch_before(trunk)
        trunk.num_uses -= 1
        if trunk.num_uses <= 0:
            trunk.here = None
        empty = torch.empty(0, dtype=packed.dtype, device=bytes_here.device)
        return empty.set_(bytes_here.untyped_storage(), packed.offset, packed.shape, packed.stride)

    @property
    def stream_at_work(self) -> Any:
        """The one that layers run on."""
        return self.streams.current_stream()

    def _trunk(self, tensor: Tensor) -> Trunk:
        """The tensor's memory, on its way to the host."""
        storage, version = tensor.untyped_storage(), tensor._version
        known = self.known.get(storage)
        trunk = None if known is None or known[0] != version else known[1]()
        if trunk is None:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            trunk = Trunk(whole, None if self.last is None else self.last())
            trunk.there = self.room(len(whole))
            self._fly(whole, trunk.there, trunk)
            self.known[storage] = version, weakref.ref(trunk)
            self.last = weakref.ref(trunk)
        return trunk

    def _fetch(self, trunk: Trunk) -> Tensor:
        """Its bytes on the device: as they are, on their way there, or sent for now."""
        if trunk.here is None:
            # Of the stream at work: whatever used this memory before is over when the copy begins.
            trunk.here = torch.empty(len(trunk.there), dtype=torch.uint8, device=self.device)
            trunk.ready = self._fly(trunk.there, trunk.here, None)
        return trunk.here

    def _fetch_before(self, trunk: Trunk) -> None:
        size, before = 0, trunk.before
        while before is not None and (other := before()) is not None and size + len(other.there) <= self.at_once:
            if other.num_uses > 0:
                self._fetch(other)
                size += len(other.there)
            before = other.before

    def _fly(self, source: Tensor, target: Tensor, leaves: Trunk | None) -> Any:
        """Copy beside the work; the answer is when it has landed."""
        self._land()
        self.stream.wait_stream(self.stream_at_work)
        with self.streams.stream(self.stream):
            target.copy_(source, non_blocking=True)
            landed = self.stream.record_event()
        self.flights.append((landed, target if leaves is None else source, leaves))
        return landed

    def _land(self) -> None:
        """Give up what has landed; and where too much is in the air, let the work wait for the first of it."""
        while self.flights:
            landed, held, leaves = self.flights[0]
            if not landed.query():
                if sum(len(bytes_here) for _, bytes_here, _ in self.flights) <= self.at_once:
                    return
                self.stream_at_work.wait_event(landed)
            self.flights.popleft()
            if leaves is not None and leaves.here is held:
                leaves.here = None

    def room(self, size: int) -> Tensor:
        """So many bytes of host memory; torch rounds what is pinned up to a power of two."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type != "cpu")


def is_weight(tensor: Tensor, module: nn.Module) -> bool:
    """Whether it is one of the module's weights, or one cast to the precision of products."""
    return any(_is_same(tensor, weight) or _is_cast(tensor, weight) for weight in module.parameters())


def _is_same(tensor: Tensor, weight: Tensor) -> bool:
    # A DTensor has no memory of its own; while it is multiplied, what was gathered stands in its place.
    if hasattr(weight, "to_local"):
        return False
    return tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def _is_cast(tensor: Tensor, weight: Tensor) -> bool:
    """A matrix is saved turned, which no activation is; stacks of them are told by their three dimensions."""
    if tensor.dtype == weight.dtype or tensor.dim() != weight.dim():
        return False
    if tensor.dim() == 2:
        return tensor.shape == weight.shape[::-1] and tensor.stride() == (1, weight.shape[1])
    return tensor.dim() == 3 and tensor.shape == weight.shape


def offload_layers(model: nn.Module, offload: Offload | None) -> None:
    """Let every layer that is here keep there what its backward pass will need; None: where it is."""
    for block in model.modules():
        if isinstance(block, Block):
            block.offload = offload


def build_offload(device: torch.device, *, is_wanted: bool) -> HostMemory | None:
    """None where it is not wanted, and on CPUs, where activations lie in host memory anyway."""
    return None if device.type == "cpu" or not is_wanted else HostMemory(device, torch.get_device_module(device))
