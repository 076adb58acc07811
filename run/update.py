"""The end of an optimizer step, however its gradients were made: sums over ranks, the norm, clipping, the update."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from model.transformer import Transformer
from moe.balance import BalanceSettings, update_biases
from moe.router import Router
from moe.telemetry import RoutingMeter
from optim.groups import Optimizer
from parallel.gradients import clip_gradients, named_parameters, norm_over_ranks, sum_gradients
from parallel.world import World
from run.start import Run


def update(
    model: Transformer,
    optimizer: Optimizer,
    routing: RoutingMeter,
    run: Run,
    *,
    nats: Tensor,
    num_targets: Tensor,
    rules: Sequence[BalanceSettings],
    own: Callable[[Tensor], Tensor] = lambda counts_LE: counts_LE,
) -> tuple[Tensor, Tensor]:
    """Take the step, or let the guard skip it. Returns the loss and the gradient norm of the whole step.

    nats: this rank's sum over targets; num_targets: of all ranks. rules: of balance. own: of the counts of all MoE
    layers, (L, E), those of the layers that are here. All ranks have to call.
    """
    parameters = named_parameters(model)
    sum_gradients(parameters, run.layouts, run.mesh)
    for tensor in (nats, *routing.tensors()):
        ranks_of_pipeline(run).sum(run.mesh.data.sum(tensor))
    loss, gradient_norm = nats / num_targets, norm_over_ranks(parameters, run.layouts, run.mesh)
    clip_gradients(optimizer.parameters, gradient_norm, optimizer.clip)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    counts_lE = None if routing.counts_LE is None else own(routing.counts_LE)
    move_biases = partial(update_biases, routers, counts_lE, rules)
    run.guard.update(optimizer, loss, gradient_norm, routers, move_biases)
    return loss, gradient_norm


def ranks_of_pipeline(run: Run) -> World:
    """The ranks that hold the layers one after another, this one among them."""
    grid, rank = run.mesh.grid, run.world.rank
    return World(grid.place("pipeline", rank), grid.pipeline, run.world.local_rank, run.mesh.group("pipeline"))
