"""Sharded weights, gradients and moments: what a rank keeps, what it sends, and the numbers of weights that are whole.

That five steps are those of one process is in test_equality.py.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.transformer import build_model
from moe.layer import MoE
from parallel.fsdp import shard, sync_replicas
from parallel.layout import Layout, local
from parallel.mesh import Grid, Mesh
from parallel.world import World
from run.config import load_config
from run.microbatches import forward, loss_of
from tests.parallel.setting import TINY, Setting, assert_close, this_world

PLAIN = (
    "tokens_per_step=768",
    "tokens_per_microbatch=64",
    "context.stages.1.sequence_length=64",
    "model.moe.num_shared_experts=1",
)
"""12 rows, which 1 to 4 ranks share; the tiny model's head norms and its MoE layer."""
WIDE = (*PLAIN, "model.width=96", "model.feed_forward_width=192", "model.moe.expert_width=64")
NO_NORMS = "model.attention={num_heads = 2, num_kv_heads = 1}"


def ways() -> Iterator[tuple[str, ...]]:
    """To cut these ranks' weights: all alike, in replicas, with experts apart in every relation, and tensors too."""
    lengths = {
        2: ({"shard": 2}, {"shard": 2, "expert": 2}),
        3: ({"shard": 3},),
        4: (
            {"shard": 4},
            {"shard": 2},
            {"shard": 4, "expert": 2},
            {"shard": 2, "expert": 4},
            {"shard": 2, "expert": 2},
            {"shard": 2, "tensor": 2},
        ),
    }[dist.get_world_size()]
    for axes in lengths:
        heads = ["model.attention.num_kv_heads=2"] if "tensor" in axes else []
        yield (*heads, *(f"parallel.{axis}={length}" for axis, length in axes.items()))


def case_every_parameter_lies_as_its_layout_says() -> None:
    """FSDP's own parts, brought together by itself, are the whole; each is what ours says, where it is uneven too."""
    for axes in ways():
        own = Setting(this_world(), *PLAIN, *axes)
        mesh, layouts = own.run.mesh, own.run.layouts
        num_apart = 0
        for name, parameter in own.model.named_parameters():
            layout, value = layouts[name], own.first_value(name, layouts[name].shape, 0)
            assert torch.equal(local(parameter), layout.take(value, mesh.grid, mesh.world.rank)), f"{axes} {name}"
            if isinstance(parameter, DTensor):
                assert layout.is_cut("shard") or layout.is_cut("expert_shard")
                num_apart += layout.is_cut("expert_shard")
                before = Layout(layout.shape, cuts=layout.cuts[:-1]).take(value, mesh.grid, mesh.world.rank)
                assert torch.equal(parameter.full_tensor(), before), f"{axes} {name}"
            else:
                assert "experts" in name and mesh.grid.expert >= mesh.grid.shard, f"{axes}: {name} is not cut"
        assert (num_apart > 0) == (mesh.grid.shard > mesh.grid.expert > 1)


def case_a_rank_keeps_its_share_between_steps() -> None:
    """Of weights, gradients and both moments, and nothing else of their size."""
    for axes in ways():
        sizes = []
        for world, overrides in ((World(), ()), (this_world(), axes)):
            setting = Setting(world, *WIDE, *(axes[:-2] if world.size == 1 else ()), *overrides)
            before = bytes_alive()
            kept = sum(tensor.nbytes for tensor in states_of(setting))  # none yet but weights
            for number in range(2):
                setting.step(number).routing.report()  # which looks at some choices again
            sizes.append((kept, bytes_alive() - before, sum(tensor.nbytes for tensor in states_of(setting))))
        (weights, _, whole), (own_weights, grown, own) = sizes
        layouts, mesh = setting.run.layouts, setting.run.mesh
        share = sum(layout.part_shape(mesh.grid, mesh.world.rank).numel() for layout in layouts.values())
        assert own_weights == 4 * (share - num_biases(setting)), axes
        assert share <= 1.02 * weights / 4 / least_copies(setting) + num_biases(setting), axes
        # Step counts are a few bytes.
        assert abs(own - 4 * own_weights) < 0.02 * own and abs(whole - 4 * weights) < 0.02 * whole
        assert grown <= 3 * own_weights + 0.02 * weights, f"{axes}: {grown} bytes more than {own_weights} x 3"


def least_copies(setting: Setting) -> float:
    """Into how many parts the model is cut, at least."""
    grid = setting.run.mesh.grid
    return grid.shard * grid.tensor / (1 + 0.1 * (grid.tensor - 1))  # norms and routers are in no tensor's part


def num_biases(setting: Setting) -> int:
    return sum(buffer.numel() for buffer in setting.model.buffers())


def states_of(setting: Setting) -> Iterator[Tensor]:
    for parameter in setting.optimizer.parameters:
        yield local(parameter)
        if parameter.grad is not None:
            yield local(parameter.grad)
    for optimizer in setting.optimizer.optimizers:
        for state in optimizer.state.values():
            yield from (local(value) for value in state.values() if isinstance(value, Tensor))


def bytes_alive() -> int:
    """Of all storages that some tensor has."""
    gc.collect()
    with torch.no_grad():
        found = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
        tensors = [local(x) for x in found if not x.is_meta]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def case_bf16_products_are_those_of_autocast_on_whole_weights() -> None:
    """Hidden states, loss and gradients to the bit, where no head norm has a weight of its own to be rounded."""
    if dist.get_world_size() != 2:
        return
    for axes in ((NO_NORMS, "parallel.shard=2"), (NO_NORMS, "parallel.shard=2", "parallel.expert=2")):
        own = Setting(this_world(), *PLAIN, *axes, dtype=torch.bfloat16)
        alone = Setting(World(), *PLAIN, NO_NORMS, dtype=torch.bfloat16)
        is_exchanged = "parallel.expert=2" in axes
        hidden, sums, gradients = pass_both_ways(own)
        expected_hidden, expected_sums, expected_gradients = pass_both_ways(alone, batch=own.microbatches(0)[0])
        assert hidden.dtype == expected_hidden.dtype
        if not is_exchanged:  # whose sums over experts are made in another order
            assert torch.equal(hidden, expected_hidden) and torch.equal(sums, expected_sums)
        assert_close("loss", sums, expected_sums, 1e-3)
        for name, expected in expected_gradients.items():
            dist.all_reduce(expected)
            part = own.run.layouts[name].take(expected, own.run.mesh.grid, dist.get_rank())
            if not is_exchanged:
                assert torch.equal(gradients[name], part), name
            assert_close(name, gradients[name], part, 2e-2)


def case_bf16_head_norms_and_sinks_are_those_of_autocast_too() -> None:
    """To the bit, with weights that bf16 would round."""
    if dist.get_world_size() != 2:
        return

    class Drawn(Setting):
        def first_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
            value = super().first_value(name, shape, seed)
            special = name.endswith(("query_norm.weight", "key_norm.weight", "latent_norm.weight", "sink_H"))
            return value + torch.linspace(-0.3, 0.4, value.numel()).view(shape) if special else value

    heads = "model.attention={num_heads = 2, num_kv_heads = 1, head_norms = true, sink = true}"
    latent = (
        "model.attention={kind='latent',num_heads=2,query_rank=8,latent_rank=8,nope_channels=4,rope_channels=4,"
        "value_channels=4}"
    )
    for attention in (heads, latent):
        own = Drawn(this_world(), *PLAIN, attention, "parallel.shard=2", dtype=torch.bfloat16)
        alone = Drawn(World(), *PLAIN, attention, dtype=torch.bfloat16)
        batch = own.microbatches(0)[0]
        ours, theirs = pass_both_ways(own, batch=batch), pass_both_ways(alone, batch=batch)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]), attention


def pass_both_ways(setting: Setting, batch: Any = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of this rank's first micro-batch: hidden states, the loss in nats, and the gradients that are left."""
    batch = setting.microbatches(0)[0] if batch is None else batch
    hidden_BTD, _ = forward(setting.model, batch, setting.run)
    sums = loss_of(setting.model, hidden_BTD, batch, setting.run)
    sums.weighted.backward()
    return hidden_BTD.detach(), sums.plain, setting.gradients()


class Sent(TorchDispatchMode):
    """How often ranks send meanwhile, by what; and how many bytes come to each in all that is gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.gathered = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_")
            self.counts[name] += 1
            self.gathered += args[0].nbytes if name == "allgather_base" else 0
        return function(*args, **(kwargs or {}))


def case_what_products_take_is_sent_in_half_the_bytes() -> None:
    """Weights of attention and feed-forwards; routers, norms between them, embedding and head in fp32."""
    sent_in: dict[torch.dtype, int] = {}
    size = dist.get_world_size()
    for dtype in (torch.float32, torch.bfloat16):
        own = Setting(this_world(), *WIDE, f"parallel.shard={size}", dtype=dtype)
        batch = own.microbatches(0)[0]
        with torch.no_grad(), Sent() as sent:
            forward(own.model, batch, own.run)
        sent_in[dtype] = sent.gathered
    kept = ("embedding", "head.", "norm.weight", "router")
    halved = {
        name: layout.shape.numel() for name, layout in own.run.layouts.items() if not any(each in name for each in kept)
    }
    total = sum(parameter.numel() for parameter in own.model.parameters())
    assert any("experts" in name for name in halved) and any("attention.query" in name for name in halved)
    # A little is padding, where parts are uneven.
    assert abs(sent_in[torch.float32] / (4 * total) - 1) < 0.01
    assert abs(sent_in[torch.bfloat16] / (4 * total - 2 * sum(halved.values())) - 1) < 0.01


def case_replicas_add_up_once_a_step_and_shards_with_each_micro_batch() -> None:
    if dist.get_world_size() != 4:
        return
    seen = {}
    for tokens in (64, 192):
        own = Setting(this_world(), *PLAIN, "parallel.shard=2", f"tokens_per_microbatch={tokens}")
        microbatches = own.microbatches(0)
        num_groups = len({id(module) for module in own.model.modules() if isinstance(module, FSDPModule)})
        with Sent() as sent:
            hidden = [step_of_one(own, batch, is_last=batch is microbatches[-1]) for batch in microbatches]
        assert len(hidden) == 192 // tokens
        assert sent.counts["reduce_scatter_base"] == num_groups * len(hidden), sent.counts
        assert sent.counts["allreduce"] == num_groups, sent.counts
        seen[tokens] = own.gradients()
    for name, gradient in seen[64].items():
        assert_close(name, gradient, seen[192][name], 1e-5)


def step_of_one(setting: Setting, batch: Any, *, is_last: bool) -> Tensor:
    sync_replicas(setting.model, is_last=is_last)
    hidden_BTD, _ = forward(setting.model, batch, setting.run)
    loss_of(setting.model, hidden_BTD, batch, setting.run).weighted.backward()
    return hidden_BTD


def case_experts_are_cut_among_the_ranks_that_hold_the_same() -> None:
    for axes in ways():
        own = Setting(this_world(), *PLAIN, *axes)
        grid = own.run.mesh.grid
        for moe in (module for module in own.model.modules() if isinstance(module, MoE)):
            for parameter in moe.experts.parameters():
                if grid.expert > 1 and grid.expert >= grid.shard:
                    assert not isinstance(parameter, DTensor)
                    continue
                assert isinstance(parameter, DTensor)
                expected = grid.length("expert_shard") if grid.expert > 1 else grid.shard
                *replicas, shards = parameter.device_mesh.shape
                assert shards == expected and replicas in ([], [grid.length("expert_replicate")])
            assert isinstance(moe.router.weight, DTensor) and moe.router.weight.device_mesh.shape[-1] == grid.shard


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 3, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""


def test_without_shards_nothing_is_wrapped() -> None:
    model = build_model(load_config(TINY, []).model, 257)
    shard(model, Mesh(Grid(4), World(0, 4), {}), torch.float32)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
