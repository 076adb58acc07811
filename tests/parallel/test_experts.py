"""Ranks that share experts give the numbers of one rank that holds them all: gradients, steps, checkpoints.

The cases run on 2 and 4 gloo ranks (tests/ranks.py); each rank also computes the whole of it by itself.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import train
from context.step_plan import StepPlan
from data.batches import Batch, Batches
from model.initialize import initialize
from model.transformer import build_model
from moe.dispatch import LocalDispatcher
from moe.exchange import Exchange
from moe.layer import MoE, MoESettings
from moe.routing import Memo, RoutingStats
from optim.groups import Optimizer, build_optimizer
from parallel.experts import ParallelSettings, check_experts, expert_mesh, shard_experts
from parallel.world import World, norm_over_ranks, sum_gradients
from parallel.shard import shard_of
from run.checkpoint import Checkpoints, CheckpointSettings, read_checkpoint
from run.config import RunConfig, load_config
from run.record import StepReport
from run.start import Run
from settings import Refusal

TINY = Path(__file__).parents[1] / "tiny.toml"
CPU = torch.device("cpu")
SMALL = ("tokens_per_microbatch=128", "model.moe.num_shared_experts=1")
STEPS = {
    "bias": SMALL,
    "losses, recomputed": (
        *SMALL,
        "model.moe.balance=[{kind='loss',coefficient=0.5},{kind='loss',scope='sequence',coefficient=0.5}]",
        "model.moe.z_loss=0.1",
        "recompute=true",
    ),
    "null experts and a capacity": (
        *SMALL,
        "model.moe.num_experts=8",
        "model.moe.capacity={factor=0.75}",
        "model.moe.null_experts={count=2}",
        "recompute=true",
    ),
    "muon, two layers": (
        *SMALL,
        "model.num_dense_layers=0",
        "model.moe.router={kind='softmax'}",
        "model.moe.balance=[{kind='bias'},{kind='loss'}]",
        "optimizer.kind=muon",
    ),
}


def this_world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), dist.get_rank())


def sharing() -> Iterator[int]:
    """The ways in which the ranks can share experts."""
    return (expert for expert in (2, 4) if dist.get_world_size() % expert == 0)


def own_slice(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a whole tensor."""
    shard = shard_of(parameter)
    return whole if shard is None else shard.cut(whole)


def assert_close(name: str, ours: Tensor | float, theirs: Tensor | float, tolerance: float = 1e-6) -> None:
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, f"{name}: {ours.shape}, not {theirs.shape}"
    error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-30)
    assert error <= tolerance, f"{name}: off by {error:.2e}, relative"


def text() -> str:
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(97, 103, (24_000,), generator=generator)
    letters[torch.rand(len(letters), generator=generator) < 0.2] = ord(" ")
    return bytes(letters.tolist()).decode()


@cache
def batches_of(world: World) -> Batches:
    return Batches(load_config(TINY, []).data, seed=0, rank=world.rank, world_size=world.size)


class Setting:
    """All that one optimizer step needs, on this rank of `world` or as if there were no other."""

    def __init__(self, world: World, *overrides: str, expert: int = 1, seed: int = 0) -> None:
        if this_world().is_main and not Path("words.txt").exists():
            Path("words.txt").write_text(text())
        dist.barrier()
        self.config: RunConfig = load_config(TINY, [*overrides, f"parallel.expert={expert}"])
        self.run = Run(self.config, Path("runs/none"), CPU, torch.float32, world)
        self.batches = batches_of(world)
        self.model = build_model(self.config.model, self.batches.tokenizer.vocab_size)
        initialize(self.model, seed, CPU)
        self.model.embedding.weight.data[:, 0] += 0.1
        for module in self.model.modules():
            if isinstance(module, MoE):  # far from an even load
                module.router.weight.data[:, 0] += torch.linspace(-0.05, 0.05, len(module.router.weight))
        self.mesh = expert_mesh(self.config.parallel, world, CPU)
        shard_experts(self.model, self.mesh)
        self.model.recompute = self.config.recompute
        self.model.use_rotary(self.plan(0).stage.rotary)
        self.optimizer: Optimizer = build_optimizer(self.model, self.config.optimizer)

    def plan(self, number: int) -> StepPlan:
        return self.config.stages[0].step(number)

    def microbatches(self, number: int) -> list[Batch]:
        return train.take_step(self.batches, self.plan(number), self.run)

    def step(self, number: int) -> StepReport:
        return train.train_step(self.model, self.optimizer, self.microbatches(number), self.plan(number), self.run)

    def checkpoints(self, folder: str) -> Checkpoints:
        settings, optimizers = CheckpointSettings(), self.optimizer.optimizers
        return Checkpoints(Path(folder), settings, self.model, optimizers, self.config, lambda line: None)

    def moments(self) -> dict[str, Tensor]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            f"{names[parameter]}.{key}": value
            for optimizer in self.optimizer.optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }


def case_a_layer_is_that_of_one_rank() -> None:
    """Tokens of uneven number, none on one rank; skewed routing; with and without recomputation."""
    world = this_world()
    counts = [5, 0, 3, 8][: world.size]
    settings = MoESettings(num_experts=8, experts_per_token=3, expert_width=8, num_shared_experts=1)
    x_RTD = [torch.randn(1, count, 16) for count in counts]
    grad_RTD = [torch.randn(1, count, 16) for count in counts]

    def run(layer: MoE, x_BTD: Tensor, grad_BTD: Tensor, recompute: bool) -> tuple[dict[str, Tensor], RoutingStats]:
        layer.zero_grad()
        x_BTD = x_BTD.clone().requires_grad_()
        inputs = (x_BTD, None, Memo())
        out, stats = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        stats.gates_NK.retain_grad()
        (out * grad_BTD).sum().add(stats.probabilities_NE.square().sum()).backward()
        assert x_BTD.grad is not None and stats.gates_NK.grad is not None
        return {"out": out[0].detach(), "x": x_BTD.grad[0], "gates": stats.gates_NK.grad}, stats

    def build() -> MoE:
        torch.manual_seed(1)
        layer = MoE(settings, 16)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():
            layer.router.weight[:2] *= 0.01
            layer.router.weight[5:] = layer.router.weight[5]  # ties
        return layer

    for expert in sharing():
        for recompute in (False, True):
            whole, own = build(), build()
            shard_experts(own, expert_mesh(ParallelSettings(expert=expert), world, CPU))
            theirs, their_stats = run(whole, torch.cat(x_RTD, dim=1), torch.cat(grad_RTD, dim=1), recompute)
            ours, our_stats = run(own, x_RTD[world.rank], grad_RTD[world.rank], recompute)
            sum_gradients(own.parameters(), world)
            for name, expected in theirs.items():
                assert_close(name, ours[name], expected.split(counts)[world.rank])
            for field in ("logits_NE", "probabilities_NE", "gates_NK"):
                expected = getattr(their_stats, field).split(counts)[world.rank]
                assert_close(field, getattr(our_stats, field), expected)
            assert torch.equal(our_stats.chosen_NK, their_stats.chosen_NK.split(counts)[world.rank])
            for (name, parameter), expected in zip(own.named_parameters(), whole.parameters(), strict=True):
                assert parameter.untyped_storage().nbytes() == parameter.nbytes, f"{name} keeps the whole alive"
                assert parameter.grad is not None and expected.grad is not None
                assert_close(name, parameter.grad, own_slice(expected.grad, parameter))
            expected = nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None])
            assert_close("norm", norm_over_ranks(own.parameters()), expected)


def case_a_step_is_that_of_one_rank() -> None:
    """Gradients, norm, losses, counts and the bias move, through the loop's own step."""
    for title, overrides in STEPS.items():
        whole = Setting(World(), *overrides)
        whole.optimizer.step = lambda: None  # type: ignore[method-assign]
        theirs = whole.step(0)
        numbers = theirs.routing.report()
        assert numbers["max_violation"] > 0.4, "the load is meant to be uneven"
        for expert in sharing():
            own = Setting(this_world(), *overrides, expert=expert)
            own.optimizer.step = lambda: None  # type: ignore[method-assign]
            ours = own.step(0)
            assert_close(f"{title}: loss", ours.loss, theirs.loss)
            assert_close(f"{title}: norm", ours.gradient_norm, theirs.gradient_norm, 2e-6)
            ours_numbers = ours.routing.report()
            for name in numbers.keys() - {"choice_overlap"}:  # which tells of this rank's own tokens
                assert_close(f"{title}: {name}", ours_numbers[name], numbers[name], 2e-6)
            for name, expected in whole.model.named_parameters():
                parameter = own.model.get_parameter(name)
                assert parameter.grad is not None and expected.grad is not None, name
                # After clipping, whose factor carries the norm's rounding.
                assert_close(f"{title}: {name}", parameter.grad, own_slice(expected.grad, parameter), 5e-6)
            for name, expected in whole.model.named_buffers():
                assert_close(f"{title}: {name}", own.model.get_buffer(name), expected)


def case_steps_go_on_like_those_of_one_rank() -> None:
    overrides = STEPS["muon, two layers"]
    whole = Setting(World(), *overrides)
    losses = [float(whole.step(step).loss) for step in range(4)]
    for expert in sharing():
        own = Setting(this_world(), *overrides, expert=expert)
        for step, expected in enumerate(losses):
            assert_close(f"loss of step {step}", own.step(step).loss, expected, 1e-5)
        layers = [module for module in own.model.modules() if isinstance(module, MoE)]
        assert all(len(layer.experts.down) == 4 // expert for layer in layers)
        sizes = {name: state.shape[0] for name, state in own.moments().items() if "experts.down.exp_avg" in name}
        assert set(sizes.values()) == {4 // expert}, "moments are kept of own experts alone"


def losses_and_bits(setting: Setting, steps: Iterable[int]) -> tuple[list[float], list[Tensor]]:
    losses = [float(setting.step(step).loss) for step in steps]
    return losses, [parameter.detach().clone() for parameter in setting.model.parameters()]


def case_a_checkpoint_goes_on_in_any_layout() -> None:
    """Saved as `saved`, continued as `other`: the same next losses; in the same layout the same bits."""
    overrides, layouts = STEPS["muon, two layers"], (1, *sharing())
    for saved in layouts:
        folder = f"shared_by_{saved}"
        first = Setting(this_world(), *overrides, expert=saved)
        first.step(0)
        first.checkpoints(folder).save(1, {"step": 1})
        expected, bits = losses_and_bits(first, range(1, 3))
        for other in layouts:
            second = Setting(this_world(), *overrides, expert=other, seed=9)
            assert second.checkpoints(folder).restore_latest() == {"step": 1}
            losses, other_bits = losses_and_bits(second, range(1, 3))
            for ours, theirs in zip(losses, expected, strict=True):
                assert_close(f"loss after {saved} -> {other}", ours, theirs, 1e-5)
            if saved == other:
                assert losses == expected and all(map(torch.equal, other_bits, bits)), f"{saved}: other bits"


def case_a_file_holds_every_tensor_whole() -> None:
    """Also of moments; it does not matter who wrote it, and one rank alone can read it."""
    for expert in sharing():
        own = Setting(this_world(), *SMALL, expert=expert)
        whole = Setting(World(), *SMALL)
        own.step(0), whole.step(0)
        own.checkpoints(f"whole_{expert}").save(1, {"step": 1})
        if this_world().is_main:
            _, _, weights = read_checkpoint(f"whole_{expert}")
            for name, tensor in whole.model.state_dict().items():
                # AdamW divides by the gradient's size at its first step, where rounding is all that some have.
                assert_close(name, weights[name], tensor, 1e-3)
            from run.sealed import read_tensors, verify

            place = Path(f"whole_{expert}/checkpoints/step_00000001")
            moments = read_tensors(place, "optimizer.safetensors", verify(place))
            expected = whole.moments()
            assert {key.removeprefix("state.") for key in moments} == expected.keys()
            for name, tensor in expected.items():
                assert_close(name, moments[f"state.{name}"], tensor, 1e-5)
        dist.barrier()


def case_a_checkpoint_of_other_experts_is_refused_in_whole_shapes() -> None:
    (expert, *_) = sharing()
    own = Setting(this_world(), *SMALL, expert=expert)
    own.step(0)
    own.checkpoints("few").save(1, {"step": 1})
    other = Setting(this_world(), *SMALL, "model.moe.num_experts=8", expert=expert)
    object.__setattr__(other, "config", own.config)  # as if the file had been exchanged
    with pytest.raises(Refusal, match=r"experts\.down: \(4, 16, 16\) float32 in the checkpoint, \(8, 16, 16\)"):
        other.checkpoints("few").restore_latest()


def case_fully_sharded_experts_on_a_mesh_of_their_own() -> None:
    """FSDP2: experts over the ranks that hold the same ones, everything else over all ranks; the same gradients."""
    world = this_world()
    overrides = (*STEPS["muon, two layers"], "optimizer.clip=1e9")
    whole = Setting(World(), *overrides)
    whole.optimizer.step = lambda: None  # type: ignore[method-assign]
    whole.step(0)
    for expert in sharing():
        own = Setting(world, *overrides, expert=expert)
        assert own.mesh is not None
        data_mesh = dist.init_device_mesh("cpu", (world.size,))
        shards = {id(p): shard_of(p) for p in own.model.parameters()}
        is_expert = {name: shards[id(p)] for name, p in own.model.named_parameters()}
        blocks = [block for block in own.model.blocks if block.is_moe]
        for block in blocks:
            fully_shard(block.feed_forward.experts, mesh=own.mesh["replica"])
            fully_shard(block, mesh=data_mesh)
        fully_shard(own.model, mesh=data_mesh)
        for module in own.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # ranks divide by the global count of targets: sums, not means
                module.set_force_sum_reduction_for_comms(True)
        own.optimizer.step = lambda: None  # type: ignore[method-assign]
        step_of_fsdp(own)
        norm = nn.utils.get_total_norm([p.grad for p in whole.model.parameters() if p.grad is not None])
        for name, expected in whole.model.named_parameters():
            gradient = own.model.get_parameter(name).grad
            assert isinstance(gradient, DTensor) and expected.grad is not None, name
            shard = is_expert[name]
            mine = expected.grad if shard is None else shard.cut(expected.grad)
            assert (gradient.full_tensor() - mine).norm() <= 2e-6 * max(mine.norm(), 0.01 * norm), name


def step_of_fsdp(setting: Setting) -> None:
    """The gradients of a step without our own exchange of them."""
    whole_sum, train.sum_gradients = train.sum_gradients, lambda parameters, world: None
    whole_norm, train.norm_over_ranks = train.norm_over_ranks, lambda parameters: torch.ones(())
    try:
        setting.step(0)
    finally:
        train.sum_gradients, train.norm_over_ranks = whole_sum, whole_norm


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""


@pytest.mark.parametrize(
    ("expert", "num_experts", "expected"),
    [
        (4, 6, r"model.moe.num_experts=6 must be divisible by parallel.expert=4; try parallel.expert=3 or .*=8"),
        (5, 8, r"try parallel.expert=4 or model.moe.num_experts=10"),
        (2, None, r"parallel.expert=2 shares experts, but the model has none"),
    ],
)
def test_experts_that_cannot_be_shared_are_refused(expert: int, num_experts: int | None, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_experts(ParallelSettings(expert=expert), num_experts)


def test_the_configuration_refuses_them_by_name() -> None:
    with pytest.raises(Refusal, match=r"model.moe.num_experts=4 must be divisible by parallel.expert=3; try "):
        load_config(TINY, ["parallel.expert=3"])
    with pytest.raises(Refusal, match=r"parallel\.expert"):
        load_config(TINY, ["parallel.expert=0"])
    assert load_config(TINY, ["parallel.expert=4"]).parallel.expert == 4


@pytest.mark.parametrize(
    ("expert", "size", "expected"),
    [
        (2, 1, r"parallel.expert=2 does not divide the 1 ranks of this run; start 2 of them .*parallel.expert=1"),
        (2, 5, r"start 4 of them \(torchrun --nproc-per-node 4\) or set parallel.expert=1"),
        (4, 6, r"start 4 of them .* or set parallel.expert=3"),
    ],
)
def test_ranks_that_do_not_divide_into_groups_are_refused(expert: int, size: int, expected: str) -> None:
    with pytest.raises(Refusal, match=expected):
        expert_mesh(ParallelSettings(expert=expert), World(0, size), CPU)


def test_without_shared_experts_nothing_changes() -> None:
    layer = MoE(MoESettings(num_experts=4, experts_per_token=2, expert_width=8), 16)
    before: dict[str, Any] = dict(layer.named_parameters())
    shard_experts(layer, expert_mesh(ParallelSettings(), World(0, 3), CPU))
    assert isinstance(layer.dispatcher, LocalDispatcher) and not isinstance(layer.dispatcher, Exchange)
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())
