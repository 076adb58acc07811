"""Layers whose heads, channels and vocabulary ranks have cut: the answers and gradients of one rank that has it all.

On 2 and 4 gloo ranks; each rank also computes the whole of it by itself.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attention.attention import Attention, AttentionSettings
from attention.latent import LatentAttention, LatentSettings
from attention.mask import Documents, Mask
from context.rotary import DefaultRotary
from context.rotation import LayerRotary
from model.feed_forward import FeedForward
from model.transformer import build_model
from moe.layer import MoE, MoESettings
from parallel.apply import sums_of
from parallel.gradients import named_parameters, sum_gradients
from parallel.layout import Layout, whole_layouts
from parallel.mesh import Grid, Mesh, ParallelSettings, SequenceSettings, build_mesh
from parallel.rows import lay_out
from parallel.tensor import (
    VocabularyEmbedding,
    check_rows,
    check_tensor,
    gather_tokens,
    share_out_tokens,
    split_tensors,
)
from parallel.whole import fill
from parallel.world import World
from run.config import load_config
from settings import Refusal
from tests.parallel.setting import CPU, TINY, assert_close, this_world

B, T, D, V = 2, 16, 32, 257
MASK = Mask(documents=Documents((5, 11, 16)))


def tensor_mesh() -> Mesh:
    return build_mesh(ParallelSettings(tensor=dist.get_world_size()), {}, this_world(), CPU)


def own_tokens(whole_BTD: Tensor, mesh: Mesh) -> Tensor:
    return whole_BTD.chunk(mesh.grid.tensor, dim=1)[mesh.world.rank]


def cut(module: nn.Module, mesh: Mesh) -> tuple[nn.ModuleDict, dict[str, Layout]]:
    """The same layer on all ranks together, with the values that it has, as `model.layer`."""
    model = nn.ModuleDict({"layer": module})
    values = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    model.to("meta")
    layouts = whole_layouts(model)
    split_tensors(model, mesh, layouts)
    for name, layout in layouts.items():
        layouts[name] = replace(layout, sums=sums_of(layout, mesh))
    fill(model, CPU, mesh, layouts, lambda name, shape: values[name])
    return model, layouts


def check_layer(title: str, build: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor, float], Any]) -> None:
    """call: (layer, tokens (B, t, D), the share of what every rank computes alike) -> (out, objective or 0)."""
    mesh = tensor_mesh()
    whole, (model, layouts) = build(), cut(build(), mesh)
    x_BTD, grad_BTD = torch.randn(B, T, D), torch.randn(B, T, D)
    theirs_x, ours_x = x_BTD.clone().requires_grad_(), own_tokens(x_BTD, mesh).clone().requires_grad_()
    theirs, objective = call(whole, theirs_x, 1.0)
    ((theirs * grad_BTD).sum() + objective).backward()
    ours, objective = call(model["layer"], ours_x, 1 / mesh.grid.tensor)
    ((ours * own_tokens(grad_BTD, mesh)).sum() + objective).backward()
    assert_close(f"{title}: out", ours, own_tokens(theirs, mesh))
    assert theirs_x.grad is not None and ours_x.grad is not None
    assert_close(f"{title}: gradient of tokens", ours_x.grad, own_tokens(theirs_x.grad, mesh))
    sum_gradients(named_parameters(model), layouts, mesh)
    num_cut = 0
    for name, expected in whole.named_parameters():
        layout, parameter = layouts[f"layer.{name}"], model.get_parameter(f"layer.{name}")
        assert expected.grad is not None and parameter.grad is not None, name
        assert expected.grad.norm() > 0, f"{title}: {name} shows nothing"
        part = layout.take(expected.grad, mesh.grid, mesh.world.rank)
        assert_close(f"{title}: {name}", parameter.grad, part, 2e-6)
        num_cut += layout.is_cut("tensor")
        assert parameter.untyped_storage().nbytes() == parameter.nbytes == layouts_bytes(layout, mesh), name
    assert num_cut >= 2


def layouts_bytes(layout: Layout, mesh: Mesh) -> int:
    """Of a part: exactly one share of what is cut."""
    shares = mesh.grid.tensor if layout.is_cut("tensor") else 1
    return 4 * layout.shape.numel() // shares


def drawn(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same values each time, so large that all shows."""

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            module = build()
            for name, parameter in module.named_parameters():
                nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
        return module

    return make


def rotation(channels: int, length: int = T) -> Any:
    rotary = LayerRotary(DefaultRotary(base=100.0), channels)
    return rotary.at(torch.arange(length).expand(B, length))["full"]


def attend(layer: nn.Module, x_BtD: Tensor, share: float) -> tuple[Tensor, float]:
    channels = layer.channels if isinstance(layer, Attention) else layer.settings.rope_channels  # type: ignore[union-attr]
    return layer(x_BtD, rotation(channels), MASK), 0.0


def case_grouped_attention() -> None:
    for window in (None, 4):
        settings = AttentionSettings(num_heads=8, num_kv_heads=4, head_norms=True, sink=True, window=window)
        check_layer(f"window {window}", drawn(lambda s=settings, w=window: Attention(s, D, window=w)), attend)


def case_latent_attention() -> None:
    for rank in (None, 12):
        settings = LatentSettings(
            num_heads=4, query_rank=rank, latent_rank=10, nope_channels=6, rope_channels=4, value_channels=5
        )
        check_layer(f"query_rank {rank}", drawn(lambda s=settings: LatentAttention(s, D, window=None)), attend)


def case_dense_feed_forward() -> None:
    check_layer("dense", drawn(lambda: FeedForward(D, 24)), lambda layer, x_BtD, share: (layer(x_BtD), 0.0))


def case_experts() -> None:
    """With all that an MoE layer may have beside its experts, and an objective that every rank computes alike."""

    def call(layer: nn.Module, x_BtD: Tensor, share: float) -> tuple[Tensor, Tensor]:
        out_BtD, stats = layer(x_BtD)
        return out_BtD, share * stats.logits_NE.logsumexp(1).square().sum()

    for router in ("softmax", "sigmoid"):
        for null_experts in (None, {"count": 2}, {"count": 2, "output": "copy"}):
            settings = MoESettings.model_validate(
                {
                    "num_experts": 6,
                    "experts_per_token": 3,
                    "expert_width": 8,
                    "num_shared_experts": 2,
                    "shared_gate": True,
                    "null_experts": null_experts,
                    "router": {"kind": router},
                    "balance": [],
                }
            )
            check_layer(f"{router}, null {null_experts}", drawn(lambda s=settings: MoE(s, D)), call)


def case_a_vocabulary_that_does_not_divide() -> None:
    mesh = tensor_mesh()
    grid, rank, group = mesh.grid, mesh.world.rank, mesh.group("tensor")
    assert group is not None
    layout = Layout(torch.Size([V, D])).cut("tensor")
    weight_VD, grad_BTD = torch.randn(V, D), torch.randn(B, T, D)
    tokens_BT = torch.randint(V, (B, T))
    tokens_BT[0, :2] = torch.tensor([0, V - 1])
    whole = nn.Embedding(V, D, _weight=weight_VD.clone())
    own = VocabularyEmbedding(V, nn.Parameter(layout.take(weight_VD, grid, rank).clone()), group)
    theirs, ours = whole(tokens_BT), own(tokens_BT)
    assert torch.equal(ours, own_tokens(theirs, mesh)), "one rank has each row, so nothing is rounded"
    (theirs * grad_BTD).sum().backward()
    (ours * own_tokens(grad_BTD, mesh)).sum().backward()
    assert whole.weight.grad is not None and own.weight.grad is not None
    assert_close("rows", own.weight.grad, layout.take(whole.weight.grad, grid, rank))
    sizes = [len(layout.take(weight_VD, grid, place)) for place in range(grid.size)]
    assert sizes == {2: [129, 128], 4: [65, 65, 65, 62]}[grid.size]


def case_gathering_and_sharing_out_undo_each_other() -> None:
    mesh = tensor_mesh()
    group, W = mesh.group("tensor"), mesh.grid.tensor
    assert group is not None
    x_BTD = torch.randn(B, T, D)
    own = own_tokens(x_BTD, mesh).clone().requires_grad_()
    whole = gather_tokens(own, group)
    assert torch.equal(whole, x_BTD)
    again = share_out_tokens(whole, group)
    assert_close("all ranks' tokens added up", again, W * own)
    again.sum().backward()
    assert own.grad is not None
    assert_close("gradient", own.grad, torch.full_like(own, W))


def case_a_rank_has_its_part_of_a_model_and_no_more() -> None:
    config = load_config(TINY, ["model.attention={num_heads = 4, num_kv_heads = 4, sink = true}"])
    mesh = tensor_mesh()
    model = build_model(config.model, V)
    layouts = whole_layouts(model)
    split_tensors(model, mesh, layouts)
    kept = {name for name, layout in layouts.items() if not layout.is_cut("tensor")}
    assert {name.split(".")[-2 if name.endswith("weight") else -1] for name in kept} <= {
        "attention_norm",
        "feed_forward_norm",
        "norm",
        "router",
        "bias_E",
    }
    assert layouts.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta and tensor.shape == layouts[name].part_shape(mesh.grid, mesh.world.rank), name


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(outcomes: dict[int, dict[str, str]], size: int, case: str) -> None:
    assert outcomes[size].get(case, "it never ran") == ""


HEADS = "model.attention={num_heads = 8, num_kv_heads = 8, channels = 4}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.tensor=2"], r"parallel.tensor=2 does not divide model.attention.num_kv_heads=1; try .*tensor=1$"),
        (["parallel.tensor=4"], r"parallel.tensor=4 does not divide model.attention.num_heads=2; try .*tensor=1$"),
        (["parallel.tensor=4", HEADS, "model.feed_forward_width=34"], r"=4 .* model.feed_forward_width=34; try .*=2"),
        (["parallel.tensor=8", HEADS, "model.moe.expert_width=12"], r"=8 .* model.moe.expert_width=12; try .*=4"),
        (
            [
                "parallel.tensor=4",
                HEADS,
                "context.stages.0.sequence_length=66",
                "tokens_per_microbatch=4224",
                "tokens_per_step=4224",
            ],
            r"context.stages.0.sequence_length=66 must be a multiple of 4, as parallel.tensor=4 ranks .*; try 64",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(overrides: list[str], expected: str) -> None:
    with pytest.raises(Refusal, match=expected):
        load_config(TINY, overrides)


def test_what_is_proposed_in_place_divides_everything() -> None:
    for heads, kv_heads, width in itertools.product((8, 12), (4, 2), (12, 16, 20, 21)):
        attention = f"model.attention={{num_heads = {heads}, num_kv_heads = {kv_heads}, channels = 4}}"
        model = load_config(TINY, [attention, f"model.moe.expert_width={width}"]).model
        for tensor in range(2, 17):
            try:
                check_tensor(ParallelSettings(tensor=tensor), model)
            except ValueError as error:
                found = re.search(r"try parallel.tensor=(\d+)$", str(error))
                assert found is not None
                check_tensor(ParallelSettings(tensor=int(found[1])), model)


@pytest.mark.parametrize("layout", ["balanced", "zigzag", "contiguous"])
@pytest.mark.parametrize("row_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 32])
def test_rows_whose_tokens_cannot_be_shared_out_are_refused(tensor: int, row_ranks: int, layout: Any) -> None:
    """Exactly where the part of a row that a rank holds does not divide, padding and all; what is proposed does."""
    sequence = SequenceSettings(layout=layout, chunks_per_rank=5)
    settings = ParallelSettings(tensor=tensor, sequence=sequence)
    for length in (*range(1, 70), 96, 128):
        held = length
        if row_ranks > 1:
            rows, _ = lay_out((length,), 1, sequence, row_ranks)
            held = rows.num_local_tokens
        if held % tensor == 0:
            check_rows(settings, length, row_ranks, "length")
            continue
        with pytest.raises(
            ValueError, match=rf"^length={length} must be a multiple of .*tensor={tensor} ranks"
        ) as caught:
            check_rows(settings, length, row_ranks, "length")
        check_rows(settings, int(str(caught.value).rpartition("try ")[2]), row_ranks, "length")


def test_without_ranks_nothing_is_cut() -> None:
    model = build_model(load_config(TINY, []).model, V)
    before = dict(model.named_parameters())
    layouts = whole_layouts(model)
    split_tensors(model, Mesh(Grid(), World(), {}), layouts)
    assert layouts == whole_layouts(model) and all(model.get_parameter(name) is p for name, p in before.items())


class Group:
    """As many ranks as it says."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks


def test_a_vocabulary_of_which_ranks_would_have_nothing_is_refused() -> None:
    model = build_model(load_config(TINY, [HEADS]).model, V)
    mesh = Mesh(Grid(32, tensor=32), World(0, 32), {"tensor": Group(32)})  # type: ignore[dict-item]
    with pytest.raises(Refusal, match=r"parallel.tensor=32 leaves some ranks none of the 257 tokens .*\.tensor=16$"):
        split_tensors(model, mesh, whole_layouts(model))
