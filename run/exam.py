"""What a run asks its model as it goes: when it is due, at both sides of a stage's beginning, and for the gate."""

from collections.abc import Mapping, Sequence
from typing import Any

from context.rotary import AnyRotary
from context.stages import Stage
from context.step_plan import StepPlan
from evals.cost import with_interval
from evals.scoring import Cell, Materials
from evals.suite import EvalsSettings, is_due, run_suite, shift_routing
from model.transformer import Transformer
from parallel.whole import whole_model
from run.gate import Verdict, judge
from run.metrics import Row, plain
from run.record import Progress, Recorder
from run.start import Run
from settings import Refusal


def settle_interval(run: Run, materials: Materials) -> EvalsSettings:
    """The run's evals, asked every so many tokens where its configuration gives a share of the training."""
    config, lengths = run.config, [step.sequence_length for step in run.config.stages.first_steps()]
    vocab_size = materials.tokenizer.vocab_size
    return with_interval(config.evals, len(materials.held_out), config.model, vocab_size, lengths)


class Examiner:
    """Asks, records, and holds each stage to its gate.

    What a resume has to know is in `state()`: the rows of the last stage's end, with which the gate of the next one
    compares, and the last verdict.
    """

    def __init__(
        self, run: Run, model: Transformer, materials: Materials, recorder: Recorder, state: Mapping[str, Any]
    ) -> None:
        """state: of the checkpoint that the run goes on from; empty for a new run."""
        self.run, self.model, self.materials, self.recorder = run, model, materials, recorder
        self._stages = run.config.stages
        self._evals = settle_interval(run, materials)
        self._stage_end: list[Row] = state.get("stage_end", [])
        verdict = state.get("verdict")
        self.verdict = None if verdict is None else Verdict.from_json(verdict)
        if self.verdict is not None and self.verdict.stage >= len(self._stages):
            raise Refusal(
                f"state.json: verdict.stage={self.verdict.stage} is no stage of this run; put a good copy back"
            )
        self.stops = self._does_stop()
        """Whether the run may not go on; the same on every rank."""

    def state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        verdict = None if self.verdict is None else self.verdict.to_json()
        return plain({"stage_end": self._stage_end, "verdict": verdict})

    def is_stage_end(self, progress: Progress) -> bool:
        """Whether a stage ends here."""
        return any(stage.until_tokens == progress.tokens for stage in self._stages)

    def after(self, step: StepPlan, progress: Progress) -> None:
        """Ask what is due after a step. At a stage's end, judge it, and ask what the next one begins with.

        Both before the checkpoint of the stage's end is written: a run that goes on from there has all their rows.
        """
        evals, stage = self._evals, step.stage
        self.run.watchdog.at(f"what follows {progress.tokens:,} tokens")
        if is_due(evals, step.start_tokens, step.end_tokens, is_stage_end=step.is_last_of_stage):
            next_rotary = self._stages.new_rotary(progress.tokens)
            cells = self._ask(evals, next_rotary)
            if step.is_last_of_stage:
                cells += self._end(stage, cells, progress)
            self.recorder.record_evals(progress, stage, cells)
        if step.is_last_of_stage and stage.index + 1 < len(self._stages):
            self._ask_at_start(self._stages[stage.index + 1], progress)
            self.recorder.renew_report()

    def enter_branch(self, progress: Progress) -> None:
        """Have at hand what the end of the stage before would have left, and ask what the branch begins with."""
        stage = self._stages.at(progress.tokens)
        before, evals = self._stages[stage.index - 1], self.run.config.evals
        self.model.use_rotary(before.rotary)
        if evals.at_stage_ends:
            kept = [Cell.from_row(row) for row in self._stage_end if row["tokens"] == progress.tokens]
            new_rotary = self._stages.new_rotary(progress.tokens)
            # The same questions to the same weights have the same answers; what the next RoPE would do is another one.
            cells = [cell for cell in kept if not cell.task.startswith("routing_shift/")]
            if kept:
                whole = whole_model(self.model, self.run.mesh, self.run.layouts)
                with self.run.watchdog.slow("an evaluation"), whole as model:
                    cells += shift_routing(model, evals, self.materials, new_rotary)
            cells = cells or self._ask(evals, new_rotary)
            self._keep(cells, progress)
            self.recorder.record_evals(progress, before, cells)
        self._ask_at_start(stage, progress)

    def obey(self) -> None:
        """Raise Refusal where the gate stops the run; the other ranks end with the same status and say nothing."""
        if self.stops:
            assert self.verdict is not None
            raise Refusal(self._ways_out(self.verdict)) if self.run.world.is_main else SystemExit(2)

    def _ways_out(self, verdict: Verdict) -> str:
        folder, stage = self.run.folder, f"context.stages.{verdict.stage}"
        branch = f"name=... branch='{{ run = \"{folder}\", stage = %d }}'"
        ways = []
        if verdict.stage > 0:
            ways += [
                f"Back to its beginning with another recipe: {branch % verdict.stage} {stage}.rotary=... or other keys."
            ]
        if verdict.stage + 1 < len(self._stages):
            ways += [f"On all the same: {branch % (verdict.stage + 1)} {stage}.gate.action=warn."]
        ways = ways or ["Train anew under another name=..."]
        return "\n".join([f"{folder}: {verdict}. The stage's end is saved, and the run stops here.", *ways])

    def _end(self, stage: Stage, cells: Sequence[Cell], progress: Progress) -> list[Cell]:
        """The gate's rows, if the stage has one; its verdict is the main rank's, whatever others have measured."""
        before = [Cell.from_row(row) for row in self._stage_end]
        self._keep(cells, progress)
        gate = stage.settings.gate
        if gate is None:
            return []
        self.verdict = judge(gate, self.run.config.context.stages, stage.index, before, cells)
        # What ranks measure may differ by rounding; that they all go on, or none of them, may not.
        self.stops = self.run.world.any(self.run.world.is_main and self._does_stop(), self.run.device)
        if not self.stops:  # `obey` says it where it does
            self.run.say(f"{'warning: ' if gate.action == 'warn' and not self.verdict.is_met else ''}{self.verdict}")
        return self.verdict.cells()

    def _ask(self, evals: EvalsSettings, new_rotary: AnyRotary | None = None) -> list[Cell]:
        """Of the whole model, which ranks that hold parts of it have to bring together first."""
        whole, watchdog = whole_model(self.model, self.run.mesh, self.run.layouts), self.run.watchdog
        # Slow: a rank whose rows are answered waits for the others', and begins no forward pass.
        with watchdog.slow("an evaluation"), whole as model, watchdog.following(model):
            return run_suite(model, evals, self.materials, new_rotary)

    def _keep(self, cells: Sequence[Cell], progress: Progress) -> None:
        self._stage_end = plain([cell.row(progress.step, progress.tokens) for cell in cells])

    def _ask_at_start(self, stage: Stage, progress: Progress) -> None:
        """Where asked for: the model under the stage's own RoPE, before the stage has trained it."""
        if self.run.config.evals.at_stage_starts:
            self.model.use_rotary(stage.rotary)
            cells = self._ask(self.run.config.evals)
            self.recorder.record_evals(progress, stage, cells, before=self._stages[stage.index - 1])

    def _does_stop(self) -> bool:
        if self.verdict is None or self.verdict.is_met:
            return False
        gate = self.run.config.context.stages[self.verdict.stage].gate
        return gate is not None and gate.action == "stop"
