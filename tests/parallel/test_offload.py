"""Activations in host memory: the same bits come back, weights stay, and the device holds little in between.

A stand-in for streams carries copies out late, as a device does: what is used too early is not there yet.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from context.rotary import DefaultRotary
from model.block import Kind
from model.initialize import initialize
from model.transformer import ModelSettings, Transformer, build_model
from parallel.offload import HostMemory, build_offload, is_weight, offload_layers
from parallel.recompute import KINDS, recompute_layers
from settings import validate
from tests.model.alive import Alive

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "num_layers": 4,
    "width": 32,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_norms": True},
    "feed_forward_width": 64,
}
MOE = {"num_experts": 4, "experts_per_token": 2, "expert_width": 24, "num_shared_experts": 1}
MODELS: dict[str, dict[str, Any]] = {"dense": {}, "experts": {"moe": MOE, "num_dense_layers": 1}}
TOKENS = torch.arange(4 * 48).view(4, 48) * 7 % 61


def built(name: str) -> Transformer:
    model = build_model(validate({**BASE, **MODELS[name]}, ModelSettings, name), 61)
    initialize(model, 0, "cpu")
    model.use_rotary(DefaultRotary(base=1e4))
    return model


class Event:
    def __init__(self, streams: "Streams") -> None:
        self.streams, self.position = streams, streams.asked

    def query(self) -> bool:
        self.streams.carry_out(self.streams.done + self.streams.progress)
        return self.streams.done >= self.position


class Streams(TorchDispatchMode):
    """One stream for copies: what is asked of it happens later, when it is waited for, or `progress` at a query."""

    def __init__(self, progress: int) -> None:
        super().__init__()
        self.progress, self.asked, self.done, self.num_waits = progress, 0, 0, 0
        self.copies: deque[tuple[Tensor, Tensor]] = deque()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        target, source = args[:2]
        target.fill_(255)
        self.asked += 1
        self.copies.append((target, source))
        return target

    def carry_out(self, position: int) -> None:
        while self.done < position and self.copies:
            target, source = self.copies.popleft()
            target.copy_(source)
            self.done += 1

    def Stream(self) -> "Streams":
        return self

    def stream(self, _stream: Any) -> AbstractContextManager[Any]:
        return self

    def current_stream(self) -> "Streams":
        return self

    def wait_stream(self, _stream: Any) -> None:
        pass

    def record_event(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        self.num_waits += self.done < event.position
        self.carry_out(event.position)


class Watched(HostMemory):
    """Notes what leaves."""

    def __init__(self, progress: int = 0, **sizes: int) -> None:
        self.lane = Streams(progress)
        super().__init__(CPU, self.lane, **sizes)
        self.left: list[Tensor] = []
        self.rooms: list[Tensor] = []

    def pack(self, tensor: Tensor, module: nn.Module | None) -> Any:
        packed = super().pack(tensor, module)
        if packed is not tensor:
            self.left.append(tensor.detach().clone())
        return packed

    def room(self, size: int) -> Tensor:
        self.rooms.append(super().room(size))
        return self.rooms[-1]


def step(model: Transformer, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The answer, what is told of routing, and all gradients."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        hidden_BTD, routing = model(TOKENS)
    (hidden_BTD.square().sum() + sum(stats.logits_NE.square().sum() for stats in routing)).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [hidden_BTD.detach(), *(stats.chosen_NK for stats in routing), *gradients]


@pytest.mark.parametrize("at_once", [1, 50_000, 10**9])
@pytest.mark.parametrize("progress", [0, 1, 10**6])
@pytest.mark.parametrize("kinds", [*KINDS, ("none", "ops", "full", "none")])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_identical(name: str, kinds: Any, progress: int, at_once: int) -> None:
    model = built(name)
    expected = step(model)
    memory = Watched(progress, smallest=1, at_once=at_once)
    recompute_layers(model, kinds)
    offload_layers(model, memory)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(step(model), expected, strict=True))
    assert memory.left, "nothing left"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_can_be_asked_for_twice(kind: Kind) -> None:
    model = built("experts")
    recompute_layers(model, kind)
    offload_layers(model, Watched(smallest=1))
    parameters = [p for name, p in model.named_parameters() if name != "head.weight"]
    loss = model(TOKENS)[0].square().sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(first, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_weights_and_small_tensors_stay(name: str, kind: Kind) -> None:
    model = built(name)
    memory = Watched(smallest=6_000)
    recompute_layers(model, kind)
    offload_layers(model, memory)
    step(model)
    assert memory.left and all(room.numel() >= 6_000 for room in memory.rooms)
    for weight in model.parameters():
        assert not any(left.shape == weight.shape and torch.equal(left, weight) for left in memory.left)
        assert not any(left.shape == weight.T.shape and torch.equal(left, weight.T) for left in memory.left)
    none = Watched(smallest=10**9)
    recompute_layers(model, kind)
    offload_layers(model, none)
    step(model)
    assert not none.left


def test_weights_in_low_precision_stay_too() -> None:
    """As products save them: turned, or as they are where they are stacks."""
    linear, stack = nn.Linear(8, 24, bias=False), nn.ParameterList([torch.randn(4, 8, 6)])
    low, low_stack = linear.weight.to(torch.bfloat16), stack[0].to(torch.bfloat16)
    assert is_weight(linear.weight.T.detach(), linear) and is_weight(linear.weight[2:].detach(), linear)
    assert is_weight(low.T.detach(), linear) and is_weight(low_stack.detach(), stack)
    activations = torch.randn(8, 24, dtype=torch.bfloat16)
    assert not is_weight(activations, linear) and not is_weight(low_stack.transpose(1, 2).contiguous(), stack)


@pytest.mark.parametrize("kind", KINDS)
def test_what_several_operations_save_leaves_once(kind: Kind) -> None:
    model, memory = built("dense"), Watched(smallest=1)
    recompute_layers(model, kind)
    offload_layers(model, memory)
    hidden_BTD, _ = model(TOKENS)
    assert len(memory.rooms) <= len(memory.left) and (kind != "none" or len(memory.rooms) < len(memory.left))
    assert hidden_BTD.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_between_forward_and_backward_the_device_holds_no_activations(name: str, kind: Kind) -> None:
    """But what is told of routing, and what the head needs."""

    def alive(memory: Watched | None) -> int:
        model = built(name)
        recompute_layers(model, kind)
        offload_layers(model, memory)
        weights = [*model.parameters(), *model.buffers()]
        with Alive([*weights, TOKENS]) as seen:
            answer = model(TOKENS)
            if memory is not None:
                memory._land()
                memory.last = None
                memory.left.clear()
                rooms = sum(room.nbytes for room in memory.rooms)
        told = [value for stats in answer[1] for value in vars(stats).values() if isinstance(value, Tensor)]
        ends = TOKENS.numel() * 4 * (2 * 32 + 1)
        own = sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in told}.values()) + ends
        return seen.bytes - own - (0 if memory is None else rooms)

    there, here = alive(Watched(10**6, smallest=1)), alive(None)
    assert here > 4 * TOKENS.numel() * 32 * 4, "the layers' inputs at least"
    table = TOKENS.numel() * 4 * 8  # of the rotation, which checkpoints hold on to
    assert 0 <= there <= table + 1_000, (there, here)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_needed_next_is_sent_for_before_it_is_asked_for(kind: Kind) -> None:
    """With progress enough nothing is fetched late but what the last layer asks for first."""
    model, memory = built("dense"), Watched(smallest=1)
    recompute_layers(model, kind)
    offload_layers(model, memory)
    hidden_BTD, _ = model(TOKENS)
    memory.lane.progress = 10**6
    memory._land()
    asked: list[bool] = []
    fetch = memory._fetch

    def watched(trunk: Any) -> Tensor:
        asked.append(trunk.here is None)
        return fetch(trunk)

    unpack: Callable[[Any], Tensor] = memory.unpack

    def unpacked(packed: Any) -> Tensor:
        late.append(not isinstance(packed, Tensor) and packed.trunk.here is None)
        return unpack(packed)

    late: list[bool] = []
    memory._fetch, memory.unpack = watched, unpacked  # type: ignore[method-assign]
    hidden_BTD.square().sum().backward()
    assert sum(asked) >= 4, "everything comes back"
    assert sum(late) <= (2 if kind == "ops" else 1), late


def test_little_is_in_the_air_at_a_time() -> None:
    """Where copies are slower than layers, layers wait."""
    model, memory = built("dense"), Watched(smallest=1, at_once=60_000)
    recompute_layers(model, "none")
    offload_layers(model, memory)
    held: list[int] = []
    land = memory._land

    def watched() -> None:
        land()
        held.append(sum(len(flight[1]) for flight in memory.flights))

    memory._land = watched  # type: ignore[method-assign]
    hidden_BTD, _ = model(TOKENS)
    assert max(held) <= 60_000 and memory.lane.num_waits > 0
    hidden_BTD.sum().backward()


def test_on_a_cpu_nothing_moves() -> None:
    assert build_offload(CPU, is_wanted=True) is None
