"""Steps whose numbers are no numbers, or spikes, change nothing: what is skipped, counted, rolled back or refused.

The judgement is on the loss and the gradient norm of the whole step, which all ranks bring to the same bits first, so
that all of them skip or none does. A skipped step leaves weights, moments and biases as they were, bit for bit; tokens
and steps go on, and its data is passed over.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from checkpoint.checkpoints import Checkpoints
from checkpoint.writing import settle
from context.step_plan import StepPlan
from moe.router import Router
from optim.groups import Optimizer
from parallel.layout import local
from parallel.world import World
from run.spikes import History, SpikeSettings
from run.watchdog import Watchdog
from settings import Refusal, Section

NOTHING_SKIPPED = {"skipped_steps": 0}
"""Since the row of metrics before."""


class GuardSettings(Section):
    """When the update of a step is left out, and when the run stops."""

    most_skipped: int = Field(default=10, ge=0)
    """Steps in a row that may be skipped; with one more the run stops. 0: it stops at the first."""
    spike: SpikeSettings | None = None
    """Left out: only a loss or a gradient that is no number is skipped."""


class Reason(NamedTuple):
    """Why a step is skipped."""

    text: str
    is_spike: bool = False


class Guard:
    """Takes the steps of a run, or skips them; its `state` is part of every checkpoint.

    Where the optimizer can skip on the device and no spike is looked for, nobody waits for the device at a step: what
    was skipped is found out when a row or a checkpoint is written, or after `most_skipped` steps.
    """

    def __init__(
        self, settings: GuardSettings | None = None, world: World | None = None, watchdog: Watchdog | None = None
    ) -> None:
        """world: all ranks of the run. watchdog: is told what takes long."""
        self.settings, self.world = settings or GuardSettings(), world or World()
        self.watchdog = watchdog or Watchdog()
        self.history = History(self.settings.spike)
        self.skipped = self.in_a_row = self.roll_backs = 0
        self.passed_over: list[list[Any]] = []
        """[first step, last step, reason] of each stretch that left nothing in the weights."""
        self.owes_save = False
        """Whether a checkpoint that was due could not be written yet."""
        self._row: dict[str, Any] = dict(NOTHING_SKIPPED)
        self._unseen: list[Tensor] = []  # (loss, norm) of the last steps, still on the device
        self._judged: list[Reason | None] = []  # of the last steps, not counted yet

    def update(
        self,
        optimizer: Optimizer,
        loss: Tensor,
        norm: Tensor,
        routers: Iterable[Router],
        move_biases: Callable[[], object],
    ) -> None:
        """Step the optimizer and move the biases, or leave both as they are. All ranks call it, once a step.

        loss, norm: of the whole step, on every rank, before clipping; scalars on the device. routers: those whose
        biases `move_biases` moves.
        """
        seen_2 = self._agree(loss, norm)
        if can_skip_on_device(self.settings, optimizer, seen_2.device):
            self._unseen.append(seen_2)
            with undone_where(seen_2.isinf().any(), optimizer, routers):
                optimizer.step()
                move_biases()
            return
        self._judged.append(self._judge(*seen_2.tolist()))
        if self._judged[-1] is None:
            optimizer.step()
            move_biases()

    def after(self, number: int, step: StepPlan, optimizer: Optimizer, checkpoints: Checkpoints) -> None:
        """Count what step `number` came to; go back, or stop, where that is due. Raises Refusal, on all ranks."""
        goes_back = bool(self._judged) and self._is_roll_back(self._judged[-1]) and checkpoints.latest_step is not None
        if self._judged or len(self._unseen) > self.settings.most_skipped:
            self.settle(number)
        if goes_back:
            self._roll_back(number, step, optimizer, checkpoints)
        self._refuse_too_many(checkpoints.latest_step)
        if step.is_last_of_stage:
            self.history.forget()

    def settle(self, number: int) -> None:
        """Count all steps up to `number`; waits for the device."""
        if self._unseen:
            self._judged += [self._judge(*numbers) for numbers in torch.stack(self._unseen).tolist()]
            self._unseen.clear()
        for each, reason in enumerate(self._judged, number - len(self._judged) + 1):
            if self.in_a_row > self.settings.most_skipped:
                break  # the run ends there, whatever came after
            if reason is None:
                self.in_a_row = 0
            else:
                self._count(each, reason.text)
        self._judged.clear()

    def may_save(self, number: int, checkpoints: Checkpoints, *, is_stage_end: bool) -> bool:
        """Whether step `number` may be saved; raises Refusal, on all ranks, where its numbers must never be.

        While steps are skipped nothing is saved: weights that give no numbers may be the cause. What was due is owed
        until a step is taken. The end of a stage cannot wait: it is saved if one step alone was skipped before it.
        """
        self.settle(number)
        last_good = checkpoints.latest_step
        self._refuse_too_many(last_good)
        if self.in_a_row and not (is_stage_end and self.in_a_row == 1):
            if is_stage_end:
                text = f"{self.passed_over[-1][2]}, as the last of {self.in_a_row} skipped steps before the stage's end"
                self._refuse(f"step {number}: {text}", last_good)
            self.owes_save = True
            self._say(f"step {number}: not saved, as it was skipped; {_kept(last_good)}")
            return False
        if self.world.any(not all_finite(_all_tensors(checkpoints)), _device(checkpoints)):
            self._refuse(f"step {number}: weights or moments are not finite after it", last_good)
        self.owes_save = False
        return True

    def row(self, number: int) -> dict[str, Any]:
        """For the row of metrics of step `number`: how many steps were skipped since the row before, and why."""
        self.settle(number)
        row, self._row = self._row, dict(NOTHING_SKIPPED)
        return row

    def state(self) -> dict[str, Any]:
        """Plain JSON, with which a run that goes on judges as it would have without a break."""
        names = ("skipped", "in_a_row", "roll_backs", "passed_over")
        mine = {name: getattr(self, name) for name in names}
        return {"guard": {**mine, "row": dict(self._row), "history": self.history.state()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what a checkpoint's state has of `state`; without it, as a run begins."""
        mine = state.get("guard", {})
        self.skipped, self.in_a_row = mine.get("skipped", 0), mine.get("in_a_row", 0)
        self.roll_backs, self.passed_over = mine.get("roll_backs", 0), list(mine.get("passed_over", ()))
        self._row = dict(mine.get("row", self._row))
        self.history.restore(mine.get("history", {}))

    def _agree(self, loss: Tensor, norm: Tensor) -> Tensor:
        """(2,) fp32, the same bits on every rank; what is not finite on any of them is infinite on all."""
        seen_2 = torch.stack([loss.detach().float(), local(norm).detach().float()])
        seen_2 = torch.where(seen_2.isfinite(), seen_2, torch.inf)
        if self.world.size > 1:
            dist.all_reduce(seen_2, dist.ReduceOp.MAX, group=self.world.group)
        return seen_2

    def _judge(self, loss: float, norm: float) -> Reason | None:
        """Why a step is skipped; one that is taken is remembered."""
        bad = [name for name, value in (("loss", loss), ("gradient norm", norm)) if value == math.inf]
        if bad:
            return Reason(f"the {bad[0]} is not finite" + "".join(f", nor is the {name}" for name in bad[1:]))
        spike = self.history.spike({"loss": loss, "gradient_norm": norm})
        if spike is not None:
            return Reason(spike, is_spike=True)
        self.history.add({"loss": loss, "gradient_norm": norm})
        return None

    def _is_roll_back(self, reason: Reason | None) -> bool:
        spike = self.settings.spike
        return reason is not None and reason.is_spike and spike is not None and spike.action == "roll_back"

    def _count(self, number: int, text: str) -> None:
        self.skipped += 1
        self.in_a_row += 1
        self._row = {"skipped_steps": self._row["skipped_steps"] + 1, "skip_reason": text}
        before = self.passed_over[-1] if self.passed_over else None
        if before is not None and before[1:] == [number - 1, text]:
            before[1] = number
        else:
            self.passed_over.append([number, number, text])
        self._say(f"step {number}: skipped, as {text} ({self.in_a_row} in a row, {self.skipped} in this run)")

    def _roll_back(self, number: int, step: StepPlan, optimizer: Optimizer, checkpoints: Checkpoints) -> None:
        """Weights, moments and history as the newest good checkpoint has them; all steps since are passed over.

        What is decided here is saved at once. A run that is killed before that comes here again from the checkpoint,
        by the same numbers, so that nothing else has to be written down.
        """
        assert self.settings.spike is not None
        most, text = self.settings.spike.most_roll_backs, self.passed_over[-1][2]
        if self.roll_backs >= most:
            why = f"step {number}: {text}, after {most} roll backs (guard.spike.most_roll_backs={most})"
            self._refuse(why, checkpoints.latest_step)
        with self.watchdog.slow(f"going back from step {number}"):
            state = checkpoints.restore_latest()
        assert state is not None
        # A stage that begins anew without moments has had its first step since.
        if state["tokens"] <= step.stage.start_tokens and step.stage.settings.moments == "reset":
            optimizer.forget_moments()
        self.history.restore(state.get("guard", {}).get("history", {}))
        first = state["step"] + 1
        kept = [[start, min(end, first - 1), why] for start, end, why in self.passed_over if start < first]
        self.passed_over = [*kept, [first, number, text]]
        self.roll_backs, self.in_a_row, self.owes_save = self.roll_backs + 1, 0, True
        self._row["skip_reason"] = f"{text}; rolled back to step {first - 1}"
        self._say(f"step {number}: rolled back to step {first - 1}; the data of the steps since is passed over")

    def _refuse_too_many(self, last_good: int | None) -> None:
        most = self.settings.most_skipped
        if self.in_a_row > most:
            _, number, text = self.passed_over[-1]
            why = f"step {number}: {text}, after {most} skipped steps in a row (guard.most_skipped={most})"
            self._refuse(why, last_good)

    def _refuse(self, why: str, last_good: int | None) -> NoReturn:
        """On every rank; the main one says it, and what it calls intact is on the disk by then."""
        with self.watchdog.slow("what was saved last"):
            settle()
        if not self.world.is_main:
            raise SystemExit(2)
        raise Refusal(
            f"{why}; {_kept(last_good)}. Lower optimizer.learning_rate or optimizer.clip and start under another name,"
            " or go on from the checkpoint with a larger guard.most_skipped"
        )

    def _say(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)


def can_skip_on_device(settings: GuardSettings, optimizer: Optimizer, device: torch.device) -> bool:
    """Whether a step can be skipped without the host knowing: by fused optimizers, for numbers that are none.

    On a CPU there is nobody to wait for. Muon has no such door, and a window of numbers is kept on the host.
    """
    is_fused = all(inner.defaults.get("fused") for inner in optimizer.optimizers)
    return device.type == "cuda" and settings.spike is None and is_fused


@contextmanager
def undone_where(is_bad: Tensor, optimizer: Optimizer, routers: Iterable[Router]) -> Iterator[None]:
    """Inside, a step of fused optimizers and of biases; it changes nothing where `is_bad`, a scalar on the device."""
    biases = [router.bias_E for router in routers if router.bias_E is not None]
    before = [bias_E.clone() for bias_E in biases]
    for inner in optimizer.optimizers:
        inner.found_inf = is_bad.float()  # type: ignore[attr-defined]  # the door that gradient scalers use
    try:
        yield
    finally:
        for inner in optimizer.optimizers:
            del inner.found_inf  # type: ignore[attr-defined]
    for bias_E, before_E in zip(biases, before, strict=True):
        bias_E.copy_(torch.where(is_bad, before_E, bias_E))


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or infinite, in one pass over memory; waits for the device once."""
    parts = [local(tensor) for tensor in tensors if tensor.is_floating_point()]
    largest = [torch.linalg.vector_norm(part, math.inf).float() for part in parts if part.numel()]
    return not largest or bool(torch.stack(largest).isfinite().all())


def _all_tensors(checkpoints: Checkpoints) -> Iterator[Tensor]:
    """What a checkpoint holds: parameters, persistent buffers, moments."""
    states = chain.from_iterable(optimizer.state.values() for optimizer in checkpoints.optimizers)
    moments = (value for state in states for value in state.values() if isinstance(value, Tensor))
    return chain(checkpoints.model.state_dict().values(), moments)


def _device(checkpoints: Checkpoints) -> torch.device:
    return local(next(checkpoints.model.parameters())).device


def _kept(last_good: int | None) -> str:
    return f"the checkpoint of step {last_good} is intact" if last_good else "nothing is saved yet"
