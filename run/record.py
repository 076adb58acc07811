"""What a run says about itself while it goes: metrics, evaluations, the terminal, the report."""

import contextlib
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoint.records import place_of
from context.stages import Stage
from context.step_plan import StepPlan
from data.batch import Batch
from data.distances import distances_of
from data.tokenizer import Tokenizer
from evals.grid import make_grid
from evals.lengths import trained_length
from evals.scoring import Cell
from moe.telemetry import RoutingMeter
from moe.words import routing_in_words
from parallel.sequence import farthest_view
from run.metrics import Metrics, ProgressLine, Row
from run.report import write_report
from run.speed import StepCounts, counts_of, flops_per_token, padding_share, utilization
from run.start import Run


@dataclass(frozen=True)
class Progress:
    """How far a run is: all that a resume has to know, for the data and the schedules are functions of it."""

    step: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Progress":
        """Of a checkpoint's state; of an empty one, that of a new run."""
        return cls(*place_of(state, "the checkpoint")) if state else cls()


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; tensors stay on the device until they are logged."""

    loss: Tensor
    """Mean nats of a target token, unweighted, over all ranks."""
    gradient_norm: Tensor
    """Before clipping."""
    routing: RoutingMeter
    microbatches: list[Batch]


class Recorder:
    """Writes the rows of metrics.jsonl and evals.jsonl, draws the terminal, and leaves the report behind.

    On ranks other than the main one it only keeps the clock.
    """

    def __init__(self, run: Run, tokenizer: Tokenizer, progress: Progress) -> None:
        self.run, self.tokenizer = run, tokenizer
        config = run.config
        self.metrics = self.line = None
        if run.world.is_main:
            self.metrics = Metrics(run.folder, progress.step, config.log.tensorboard)
            self.line = ProgressLine(config.name, config.total_tokens, routing=routing_in_words(config.model.routed))
        if progress.step:
            run.say(f"{run.folder}: continues at step {progress.step}, {progress.tokens:,} tokens")
        self._restart_window()

    @contextlib.contextmanager
    def profile(self, progress: Progress) -> Iterator[None]:
        """Wraps one training step; inside the configured window torch's profiler watches it."""
        window = self.run.config.profile
        if window is None or not window.start_step <= progress.step < window.start_step + window.num_steps:
            yield
            return
        with torch.profiler.profile(record_shapes=True, profile_memory=True) as profiler:
            yield
        folder = self.run.folder / "profile"
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"step_{progress.step:08d}_rank_{self.run.world.rank}.json"))

    def record(self, progress: Progress, step: StepPlan, report: StepReport, learning_rate: float) -> None:
        """Write a row when one is due: the only place of the loop where the host waits for the device."""
        config = self.run.config
        self._window_tokens += step.num_tokens
        if progress.step % config.log.every_steps and progress.tokens < config.total_tokens:
            return
        loss = float(report.loss)
        documents, bytes_per_target, distances, counts = self._count(report.microbatches, step)
        routing, speed = report.routing.report(), self._window_tokens / (time.monotonic() - self._window_start)
        vocab_size, rows = self.tokenizer.vocab_size, report.routing.computed_rows
        flops = flops_per_token(config.model, vocab_size, step.num_tokens, counts, rows)
        row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "stage": step.stage.index,
            "sequence_length": step.sequence_length,
            "loss": loss,
            "bits_per_byte": loss / math.log(2) / bytes_per_target,
            "learning_rate": learning_rate,
            "gradient_norm": float(report.gradient_norm),
            "tokens_per_second": speed,
            "flops_per_token": flops,
            "mfu": utilization(speed, flops, self.run.peak.flops, self.run.world.size),
            "padding_share": padding_share(step.num_tokens, counts),
            "peak_memory_bytes": peak_memory(self.run.device),
            "documents": documents,
            "distances": distances,
            **self.run.guard.row(progress.step),
            **routing,
        }
        if self.metrics is not None and self.line is not None:
            self.metrics.log(row)
            self.line.update(row)
        self._restart_window()

    def _count(self, microbatches: list[Batch], step: StepPlan) -> tuple[int, float, list[int], StepCounts]:
        """Of the step, over all ranks: documents, bytes of text for each target token, pairs by distance, and counts
        of what is computed."""
        labels_N = torch.cat([batch.labels_BT[batch.labels_BT >= 0] for batch in microbatches]).numpy()
        documents = sum(batch.num_documents for batch in microbatches)
        mine = counts_of(microbatches, step, self.run.config.model)
        own = [documents, self.tokenizer.num_bytes(labels_N), len(labels_N), mine.real_tokens, mine.pairs]
        views = [view for view in (step.window, farthest_view(self.run.config.model)) if view is not None]
        pairs_X = distances_of(microbatches, step.stage.settings.positions, min(views, default=None))
        counts = torch.tensor([*own, *pairs_X.tolist()], device=self.run.device)
        documents, num_bytes, targets, real, seen, *pairs = self.run.mesh.data.sum(counts).tolist()
        # Ranks of a row have counted the same pairs.
        seen, *pairs = (count // self.run.row_group.size for count in (seen, *pairs))
        while pairs and not pairs[-1]:
            pairs.pop()
        return documents, max(num_bytes, 1) / max(targets, 1), pairs, StepCounts(real, seen)

    def record_evals(
        self, progress: Progress, stage: Stage, cells: Sequence[Cell], *, before: Stage | None = None
    ) -> None:
        """Write the cells of one evaluation; at a stage's end, and at its start, show the needle grid.

        before: at a stage's start, where its RoPE has taken over and nothing is trained yet, the stage that ended.
        """
        if self.metrics is not None and self.line is not None:
            trained = trained_length(self.run.config.stages, progress.tokens)
            where: Row = {"stage": stage.index, "trained_length": trained}
            where |= {} if before is None else {"moment": "start"}
            rows = [{**cell.row(progress.step, progress.tokens), **where} for cell in cells]
            self.metrics.log_evals(progress.step, progress.tokens, rows)
            self._show_loads(self.metrics, rows)
            is_boundary = before is not None or progress.tokens == stage.until_tokens
            if is_boundary and any(cell.task == "needle" for cell in cells):
                when = f"{'after' if before is None else 'at the start of'} stage {stage.index}"
                self._show_needles(cells, when, trained)
        self.run.world.wait()
        self._restart_window()

    def renew_report(self) -> None:
        """Write the report while the run goes on."""
        if self.run.world.is_main:
            write_report(self.run.folder)
        self.run.world.wait()
        self._restart_window()

    def _show_loads(self, metrics: Metrics, rows: Sequence[Row]) -> None:
        """Expert load by layer as a picture in TensorBoard, one for each source."""
        if self.run.config.log.tensorboard:
            from run.sections import load_figures  # brings matplotlib, which a run's start should not wait for

            for source, figure in load_figures(rows):
                metrics.show_figure(f"routing/{source}", figure, rows[0]["step"])

    def _show_needles(self, cells: Sequence[Cell], when: str, trained: int) -> None:
        from evals.terminal import show  # brings matplotlib, which a run's start should not wait for

        assert self.line is not None
        grid = make_grid(cells, f"needle {when}", trained)
        show([grid], self.line.console)

    def close(self, progress: Progress, *, is_asked_to_stop: bool) -> None:
        """Close the files, write the report one last time, and say so when a signal stopped the run before its end."""
        if self.metrics is None or self.line is None:
            return
        self.line.close()
        self.metrics.close()
        if is_asked_to_stop and progress.tokens < self.run.config.total_tokens:
            self.run.say(f"stopped after step {progress.step}; the same command goes on from there")
        self.run.say(f"report: {write_report(self.run.folder)}")

    def _restart_window(self) -> None:
        self._window_start, self._window_tokens = time.monotonic(), 0


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's largest resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
