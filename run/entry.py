"""What changes in the model and the optimizer where a stage begins."""

from context.stages import Stage
from context.step_plan import StepPlan
from model.transformer import Transformer
from optim.groups import Optimizer
from parallel.recompute import recompute_layers
from parallel.sequence import split_attention
from run.start import Run


def enter_stage(model: Transformer, optimizer: Optimizer, run: Run, step: StepPlan) -> None:
    """Let model and optimizer be what the stage of this step asks for. Called before every step of the loop.

    What is set again at every step needs no memory of which stage was entered last, so a resume needs none either.
    """
    run.watchdog.at(f"the step after {step.start_tokens:,} tokens")
    take_shape(model, run, step.stage)
    # By the plan alone: a resume that lands on the first step does it too, one that lands later does not again.
    if step.stage.settings.moments == "reset" and step.is_first_of_stage:
        optimizer.forget_moments()


def take_shape(model: Transformer, run: Run, stage: Stage) -> None:
    """Rotate as the stage says, and hold rows with as many ranks: attention reaches over them, batches are shared out
    among the groups. Of each layer is computed again what its memory budget asks for there.

    The groups were made when the run started, for all stages: to make one takes all ranks at the same time.
    """
    model.use_rotary(stage.rotary)
    group = run.row_groups[run.config.row_ranks(stage)]
    if group is not run.row_group:
        run.row_group = group
        split_attention(model, group)
    if stage.index in run.kinds:
        recompute_layers(model, run.kinds[stage.index])
