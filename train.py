"""Pretrain one model from one configuration: `python train.py CONFIG [section.key=value ...]`."""

import argparse

import torch

from checkpoint.checkpoints import Checkpoints
from context.step_plan import StepPlan
from data.batches import Batch, Batches
from evals.scoring import Materials
from evals.suite import check_suite
from model.size import count
from model.transformer import Transformer, build_model
from moe.balance import StepBalance
from moe.router import Router
from moe.telemetry import RoutingMeter
from optim.groups import Optimizer, build_optimizer
from parallel.apply import parallelize
from parallel.fsdp import sync_replicas
from parallel.matrices import parts_of
from parallel.sequence import split_attention
from run.branch import begin_branch, find_origin
from run.config import RunConfig, load_config, rate_of_step, show
from run.demand import demand_of
from run.entry import enter_stage
from run.exam import Examiner
from run.initial import first_weights
from run.microbatches import count_tokens, cut_of, forward, loss_of, split, take_step, tell_plan, watch_choices
from run.pipeline_pass import check_step
from run.pipeline_step import pipeline_step
from run.record import Progress, Recorder, StepReport
from run.start import Run, leave, refusing, start
from run.trial import try_batches
from run.update import update
from run.ways import try_layers


def main(config: RunConfig, *, fresh: bool = False) -> None:
    """One run, from its start or from its newest good checkpoint, to its end or to a signal."""
    run = start(config, fresh=fresh)
    config, stages = run.config, run.config.stages
    with run.world.main_first():
        batches = Batches(config.data, seed=config.seed, rank=run.groups.rank, world_size=run.groups.size)
    for step in stages.first_steps():
        batches.check(demand_of(step, batches))
        check_step(config, step, run.num_groups(step.stage))
    materials = Materials(batches.tokenizer, batches.all_held_out(), run.device, run.autocast, ranks=run.askers)
    for line in check_suite(config.evals, materials):
        run.say(line)
    origin = find_origin(run, batches.fingerprint)
    tell_plan(batches, stages, run)
    model = build_model(config.model, batches.tokenizer.vocab_size)
    run.layouts = parallelize(model, run.mesh, config, run.device, run.dtype)
    first_weights(run, model, batches.tokenizer)
    split_attention(model, run.row_group)
    try_layers(model, stages.at(0), run)
    optimizer = build_optimizer(model, config.optimizer, parts_of(model, run.mesh, run.layouts))
    run.open_folder(batches.fingerprint, count(config.model, batches.tokenizer.vocab_size), origin)
    optimizers, layouts, mesh = optimizer.optimizers, run.layouts, run.mesh
    checkpoints = Checkpoints(run.folder, config.checkpoint, model, optimizers, config, run.say, layouts, mesh)
    state = begin_branch(checkpoints, origin, run) if origin else checkpoints.restore_latest() or {}
    progress = Progress.of(state)
    run.guard.restore(state)
    try_batches(model, optimizer, batches, run, progress.tokens)
    recorder = Recorder(run, batches.tokenizer, progress)
    examiner = Examiner(run, model, materials, recorder, state)
    if origin:
        examiner.enter_branch(progress)

    report, take = None, train_step if run.mesh.grid.pipeline == 1 else pipeline_step
    while progress.tokens < config.total_tokens and not run.should_stop() and not examiner.stops:
        step = stages.step(progress.tokens)
        progress = Progress(progress.step + 1, step.end_tokens)
        enter_stage(model, optimizer, run, step)
        microbatches = split(take_step(batches, step, run), step, run)
        optimizer.set_learning_rate(rate_of_step(config, step))
        with recorder.profile(progress):
            report = take(model, optimizer, microbatches, step, run)
        run.guard.after(progress.step, step, optimizer, checkpoints)
        recorder.record(progress, step, report, optimizer.learning_rate)
        examiner.after(step, progress)
        if checkpoints.due(progress.step) or step.is_last_of_stage or run.guard.owes_save:
            save(checkpoints, progress, run, examiner)
        run.stop_requested |= checkpoints.has_failed  # on any rank: the next save, or `close`, says why on all of them
    if checkpoints.latest_step != progress.step and report is not None:
        save(checkpoints, progress, run, examiner)  # stopped by a signal
    run.watchdog.at("what was saved last", is_slow=True)
    checkpoints.close()
    recorder.close(progress, is_asked_to_stop=not examiner.stops)
    run.finish()
    examiner.obey()


def train_step(
    model: Transformer, optimizer: Optimizer, microbatches: list[Batch], step: StepPlan, run: Run
) -> StepReport:
    """One optimizer step: the loss is the sum over all target tokens of all ranks, divided by their number."""
    config = run.config
    model.train()
    optimizer.zero_grad()
    routers = [module for module in model.modules() if isinstance(module, Router)]
    num_targets, num_real = count_tokens(microbatches, run)
    balance = StepBalance(config.model.moe if routers else None, cut_of(microbatches, step, run), num_real)
    routing = RoutingMeter(routers, run.mesh.data.rank, run.mesh.data.size)
    nats = torch.zeros((), device=run.device)
    with torch.no_grad():
        for batch in balance.ahead(microbatches):
            balance.count(forward(model, batch, run, step.window)[1], batch.rows_B.to(run.device))
    for place, batch in enumerate(batch.to(run.device) for batch in reversed(microbatches)):
        sync_replicas(model, is_last=place + 1 == len(microbatches))
        hidden_BTD, stats = forward(model, batch, run, step.window)  # the first of them completes the counts
        sums = loss_of(model, hidden_BTD, batch, run)
        (sums.weighted / num_targets + balance.objective(stats, batch.rows_B) / run.mesh.grid.tensor).backward()
        nats += sums.plain
        routing.add(stats)
    loss, gradient_norm = update(
        model, optimizer, routing, run, nats=nats, num_targets=num_targets, rules=balance.rules
    )
    watch_choices(routing, stats, model, microbatches[0], step, run)
    return StepReport(loss, gradient_norm, routing, microbatches)


def save(checkpoints: Checkpoints, progress: Progress, run: Run, examiner: Examiner) -> None:
    """Save this step, or later; raises Refusal, with the last good checkpoint untouched, of weights not finite."""
    run.watchdog.at(f"the checkpoint of step {progress.step}", is_slow=True)
    is_stage_end = examiner.is_stage_end(progress)
    if run.guard.may_save(progress.step, checkpoints, is_stage_end=is_stage_end):
        state = {**vars(progress), **examiner.state(), **run.guard.state()}
        checkpoints.save(progress.step, state, is_stage_end=is_stage_end)
    run.watchdog.at(f"what follows step {progress.step}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a TOML file, for example configs/quickstart.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values in place of the file's")
    parser.add_argument("--show", action="store_true", help="print the resolved configuration and its stages, and exit")
    parser.add_argument("--fresh", action="store_true", help="never continue a run: start anew in a new folder")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    arguments = parse_arguments()

    def enter() -> None:
        config = load_config(arguments.config, arguments.overrides)
        show(config) if arguments.show else main(config, fresh=arguments.fresh)

    leave(refusing(enter))
