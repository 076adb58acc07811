"""Layers that are run again on several ranks: the same gradients, and nothing sent twice that was kept."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from attention.mask import Documents, Mask
from model.block import Kind
from model.kept import Numbers
from model.memory import memory
from model.share import Share
from parallel.offload import offload_layers
from parallel.recompute import KINDS
from tests.model.alive import Alive
from tests.parallel.setting import Setting, assert_close, this_world
from tests.parallel.test_offload import Watched

MODEL = (
    "tokens_per_microbatch=128",
    "model.num_dense_layers=0",
    "model.attention.num_kv_heads=2",
    "model.moe.num_shared_experts=1",
    "model.moe.null_experts={count=1,output='copy'}",
    "model.moe.balance=[{kind='bias',step=1e-2},{kind='loss',coefficient=0.05}]",
    "model.moe.z_loss=0.01",
)
LATENT = "model.attention={kind='latent',num_heads=2,latent_rank=6,nope_channels=4,rope_channels=4,value_channels=3}"
WAYS = {
    "sharded": ("parallel.shard=2",),
    "experts shared": ("parallel.expert=2",),
    "experts shared, the rest sharded": ("parallel.expert=2", "parallel.shard=2"),
    "rows shared": ("parallel.context=2",),
    "rows shared by a ring": ("parallel={context=2,sequence={full='ring'}}",),
    "rows of latents shared": (LATENT, "parallel.context=2"),
    "heads cut": ("parallel.tensor=2",),
    "layers one after another": ("parallel.pipeline=2",),
}
UNCOUNTED = "model.moe.balance={kind='bias'}"
"""No pass beforehand that counts the load of a whole step."""
EXCHANGES = ("all_to_all_single", "batch_isend_irecv")
"""What carries tokens to experts, and keys to other ranks."""


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """How often this rank calls each of EXCHANGES."""
    calls: Counter[str] = Counter()

    def watched(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return plain(*arguments, **named)

        return call

    patches = [mock.patch.object(dist, name, watched(name, getattr(dist, name))) for name in EXCHANGES]
    for patch in patches:
        patch.start()
    try:
        yield calls
    finally:
        for patch in patches:
            patch.stop()


def step(way: tuple[str, ...], kind: Kind) -> tuple[Setting, Any, Counter[str]]:
    """One step of two micro-batches, by a model that is run again as `kind` says."""
    setting = Setting(this_world(), *MODEL, *way, f"recompute={kind}")
    with counting() as calls:
        report = setting.step(0)
    return setting, report, calls


def case_gradients_and_counts_are_those_of_what_is_kept() -> None:
    for name, way in WAYS.items():
        plain, report, _ = step(way, "none")
        expected, counts_LE = plain.gradients(), report.routing.counts_LE
        assert expected and counts_LE is not None
        for kind in KINDS[1:]:
            again, report_again, _ = step(way, kind)
            assert_close(f"{name}, {kind}: loss", report_again.loss, report.loss)
            assert (report_again.routing.counts_LE == counts_LE).all(), f"{name}, {kind}: counts"
            gradients = again.gradients()
            assert gradients.keys() == expected.keys()
            for parameter, gradient in gradients.items():
                assert_close(f"{name}, {kind}: {parameter}", gradient, expected[parameter])


def case_sharded_layers_keep_activations_in_host_memory_and_no_weights() -> None:
    expected = step(WAYS["sharded"], "none")[0].gradients()
    for kind in KINDS:
        setting, memory = Setting(this_world(), *MODEL, *WAYS["sharded"], f"recompute={kind}"), Watched(smallest=1)
        weights = [value for value in setting.whole(setting.parts()).values() if value.dim() > 1]
        offload_layers(setting.model, memory)
        setting.step(0)
        for name, gradient in setting.gradients().items():
            assert_close(f"offload, {kind}: {name}", gradient, expected[name])
        assert memory.left
        for left in memory.left:
            turned = (form for weight in weights for form in (weight, weight.mT))
            assert not any(left.shape == form.shape and torch.equal(left, form) for form in turned), left.shape


def case_tokens_travel_to_experts_once() -> None:
    """Two layers in two micro-batches: rows and gates go again where nothing of them is kept, the sums never do."""
    way = (*WAYS["experts shared"], UNCOUNTED)
    none, ops, full = (step(way, kind)[2]["all_to_all_single"] for kind in KINDS)
    assert none == 2 * 2 * 8, "sizes, numbers, rows, gates and back; of the last three the gradients"
    assert ops == none and full == none + 2 * 2 * 2


def case_keys_come_from_other_ranks_once() -> None:
    for name in ("rows shared", "rows shared by a ring", "rows of latents shared"):
        none, ops, full = (step(WAYS[name], kind)[2] for kind in KINDS)
        assert ops == none, f"{name}: {ops}, not {none}"
        assert full.total() > none.total(), f"{name}: attention is run again"


def case_what_is_kept_on_ranks_that_share_experts_is_counted_to_a_thousandth() -> None:
    """Each token has three of four experts, and so goes to both ranks: as many come as can. One has more slots than
    the other; of both, the mean is told."""
    way = (*WAYS["experts shared"], "model.moe.experts_per_token=3", UNCOUNTED, "model.moe.null_experts=none")
    found: dict[Kind, int] = {}
    for kind in KINDS:
        setting = Setting(this_world(), *MODEL, *way, f"recompute={kind}")
        model, tokens_BT = setting.model, torch.arange(8 * 64).view(8, 64) * 7 % setting.model.vocab_size
        mask = Mask(documents=Documents((64,) * 8))
        with torch.no_grad():
            model(tokens_BT, mask=mask)
        with Alive([*model.parameters(), *model.buffers(), tokens_BT]) as alive:
            answer = model(tokens_BT, mask=mask)
        share = Share(tokens_BT.numel(), Numbers(4, "cpu"), kind, num_ranks=2, expert_ranks=2)
        counted = memory(setting.config.model, model.vocab_size, "adamw", share).activations
        found[kind] = int(this_world().sum(torch.tensor(alive.bytes))) // 2
        assert answer
        assert counted == pytest.approx(found[kind], rel=2e-3), f"{kind}: {counted}, not {found[kind]}"
    assert found["full"] < found["ops"] < found["none"]


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(case: str, outcomes: dict[int, dict[str, str]]) -> None:
    assert not outcomes[2].get(case, "never ran"), outcomes[2].get(case)
