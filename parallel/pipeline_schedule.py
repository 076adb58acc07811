"""Micro-batches through the parts of a model, by the schedules of `torch.distributed.pipelining`.

torch sends hidden states and their gradients, and says what is done when; what a part does with a micro-batch is the
visit's, so that the loop decides on batches, losses and counts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)

from parallel.later import add_up_in_full
from parallel.pipeline_part import Part

Visit = Callable[[Part, Tensor | None, int], Tensor]
"""(a part, the hidden states that come to it or None at the first, the micro-batch's number) to what goes on: hidden
states, and at the last part the loss, a scalar."""

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


class Pipeline:
    """This rank's parts of a model, and the way of micro-batches through those of all ranks of its pipeline."""

    def __init__(self, parts: Sequence[Part], num_parts: int, group: dist.ProcessGroup, schedule: str) -> None:
        self.parts, self.num_parts, self.group, self.schedule = tuple(parts), num_parts, group, schedule
        self._built: dict[tuple[Any, ...], Any] = {}

    def both_ways(self, visit: Visit, num_microbatches: int, shape: tuple[int, ...]) -> None:
        """Every micro-batch forward and backward; gradients are added to those that are there.

        shape: of the hidden states on this rank. All ranks of the pipeline have to call.
        """
        self._run(visit, num_microbatches, shape, has_backward=True)

    @torch.no_grad()
    def forward(self, visit: Visit, num_microbatches: int, shape: tuple[int, ...]) -> None:
        """Every micro-batch forward alone, without gradients; what the last part gives is left."""
        self._run(visit, num_microbatches, shape, has_backward=False)

    def _run(self, visit: Visit, num_microbatches: int, shape: tuple[int, ...], *, has_backward: bool) -> None:
        key = (num_microbatches, shape, has_backward)
        if key not in self._built:
            # Of each kind the last: a run comes from one shape to the next, and seldom back.
            self._built = {old: built for old, built in self._built.items() if old[2] != has_backward}
            self._built[key] = self._build(*key)
        numbers = torch.arange(num_microbatches)
        with visiting(self.parts, visit if has_backward else _without_answer(visit)):
            self._built[key].step(number=numbers, **({"target": numbers} if has_backward else {}))

    def _build(self, num_microbatches: int, shape: tuple[int, ...], has_backward: bool) -> Any:
        stages = [Stage.of(part, self.num_parts, self.group, shape) for part in self.parts]
        is_single = self.schedule == "1f1b"
        if has_backward:
            kind = SCHEDULES[self.schedule]
            extras = {"loss_fn": lambda loss, _number: loss, "scale_grads": False}
        else:
            kind, extras = ScheduleGPipe if is_single else ScheduleLoopedBFS, {}
        return kind(stages[0] if is_single else stages, num_microbatches, **extras)


class Stage(PipelineStage):
    """Room for what is received is taken when it is received, and given back when it is used.

    torch holds room for every micro-batch of a step at once, and as much for gradients.
    """

    shape: tuple[int, ...]
    """Of the hidden states."""

    @classmethod
    def of(cls, part: Part, num_parts: int, group: dist.ProcessGroup, shape: tuple[int, ...]) -> "Stage":
        """A part's; its sizes are told, as torch would otherwise send a micro-batch ahead to learn them."""
        hidden_BTD = torch.empty(shape, device="meta", requires_grad=True)
        loss = torch.empty(1, device="meta", requires_grad=True)
        stage = cls(
            part,
            part.index,
            num_parts,
            next(part.parameters()).device,
            input_args=() if part.is_first else (hidden_BTD,),
            output_args=(loss if part.is_last else hidden_BTD,),
            group=group,
            dw_builder=None if part.later is None else part.later.take,
        )
        stage.shape = shape
        return stage

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """See torch."""
        self._make_room(self.args_recv_info[fwd_chunk_id], needs_gradient=self.has_backward)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """See torch."""
        answer = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._give_back(self.args_recv_info[fwd_chunk_id])
        return answer

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """See torch."""
        if self.has_backward and not self.is_last:
            self._make_room(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """See torch."""
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if self.has_backward:
            self._give_back(self.grad_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """See torch."""
        super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
        add_up_in_full(self.submod)

    def _make_room(self, received: Sequence[Any], *, needs_gradient: bool = False) -> None:
        for each in _buffers(received):
            each.buffer = torch.empty(self.shape, device=self.device, requires_grad=needs_gradient)

    def _give_back(self, received: Sequence[Any]) -> None:
        for each in _buffers(received):
            each.buffer = torch.empty(0, device=self.device)


def _buffers(received: Sequence[Any]) -> Iterator[Any]:
    """Of what torch says is received, all but the arguments of the first part."""
    return (each for each in received if getattr(each, "buffer", None) is not None)


@contextmanager
def visiting(parts: Sequence[Part], visit: Visit) -> Iterator[None]:
    """Inside, what comes to the parts is dealt with so."""
    for part in parts:
        part.visit = visit
    try:
        yield
    finally:
        for part in parts:
            part.visit = None


def _without_answer(visit: Visit) -> Visit:
    def visited(part: Part, x_BTD: Tensor | None, number: int) -> Tensor:
        answer = visit(part, x_BTD, number)
        return answer.new_zeros(()) if part.is_last else answer

    return visited


def waiting_share(schedule: str, ranks: int, parts_per_rank: int, num_microbatches: int) -> Fraction:
    """The share of a step that each rank of a pipeline waits, where nothing is lost to sending.

    A part's backward pass takes twice its forward pass; "zero_bubble" moves the weights' half of it into the waiting.
    Sources: Narayanan et al. 2021 (arXiv 2104.04473), sections 2.2.1 and 2.2.2; Qi et al. 2023 (arXiv 2401.10241),
    section 2.3.
    """
    if schedule == "1f1b":
        parts_per_rank = 1
    # In passes through one part: 1 forward, 1 for the input's gradient, 1 for the weights'.
    waits = (1 if schedule == "zero_bubble" else 3) * (ranks - 1)
    return Fraction(waits, 3 * parts_per_rank * num_microbatches + waits)
