"""A step's time against the same sums by hand, and what has to hold of any."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from context.volume import Volume
from model.size import flops_per_token, multiplied_weights
from model.transformer import ModelSettings
from model.work import Bytes, Cuts, Product, head, passes, products
from parallel.cost import Link, Links
from parallel.mesh import Grid
from planning.device import Device, published
from planning.speeds import OURS, REPEATS, Speeds, alike
from planning.step_parts import Job, Part, StepTime
from planning.step_time import step_time
from planning.timer import Timer
from settings import validate

V, T = 1000, 64
DENSE = {"num_layers": 4, "width": 32, "feed_forward_width": 96, "attention": {"num_heads": 4, "num_kv_heads": 2}}
LATENT = {
    "kind": "latent",
    "num_heads": 4,
    "query_rank": 12,
    "latent_rank": 20,
    "nope_channels": 10,
    "rope_channels": 6,
    "value_channels": 8,
}
MOE = {"num_experts": 8, "experts_per_token": 2, "expert_width": 40, "num_shared_experts": 1, "shared_gate": True}
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "latent": {**DENSE, "attention": LATENT},
    "experts": {**DENSE, "moe": MOE},
    "experts after dense layers": {**DENSE, "moe": MOE, "num_dense_layers": 2},
    "windows": {**DENSE, "attention": {**DENSE["attention"], "window": 8}, "pattern": ["window", "full"]},  # type: ignore[dict-item]
}
FREE = Link(math.inf, 0.0)
"""Through which anything is there at once."""
SLOW = Links(Link(1e9, 1e-6), Link(1e8, 1e-5), 4)
EVERYTHING = Speeds(0.5, 10.0, 0.5, dict.fromkeys(("flash2", "flash3"), 0.4), 16.0, 0.1, 0.2)


def model_of(name: str, **changed: Any) -> ModelSettings:
    return validate({**MODELS[name], **changed}, ModelSettings, name)


def device_of(links: Links = SLOW, shares: Speeds = EVERYTHING) -> Device:
    return Device("cuda", "one", torch.bfloat16, 1e12, None, 1e11, links, shares)


def job_of(name: str = "dense", **given: Any) -> Job:
    defaults = {"grid": Grid(), "tokens": 2 * T, "microbatches": 2, "lengths": (T,)}
    return Job(model_of(name), V, **(defaults | given))


def part(step: StepTime, name: str) -> Part:
    return next((part for part in step.parts if part.name == name), Part(name, 0.0))


@pytest.mark.parametrize("name", MODELS)
def test_the_products_are_all_that_a_token_is_multiplied_with(name: str) -> None:
    model = model_of(name)
    made = [p for layer in range(4) for p in products(model, layer, 1, Cuts())]
    assert sum(p.flops for p in made) + head(model, V, 1, Cuts()).flops == 2 * multiplied_weights(model, V)


@pytest.mark.parametrize("name", MODELS)
def test_at_one_speed_for_everything_time_is_the_models_operations(name: str) -> None:
    step = step_time(job_of(name), Device("cpu", "one", torch.float32, 1e9, efficiency=0.5))
    tokens = 4 * T
    assert step.seconds == pytest.approx(tokens * flops_per_token(model_of(name), V, T) / 0.5e9)
    assert step.utilization == pytest.approx(0.5) and step.tokens_per_second == pytest.approx(tokens / step.seconds)


def test_a_dense_layer_by_hand() -> None:
    """One layer, one micro-batch, one rank: every term written out."""
    N, D, F, H, G, C, peak, bandwidth = 128, 32, 96, 4, 2, 8, 1e12, 1e11
    job = replace(job_of(microbatches=1), model=model_of("dense", num_layers=1))
    step = step_time(job, device_of())

    def product(inner: int, outer: int) -> float:
        return 2 * N * inner * outer / (0.5 * peak) * (1 + 10 * (1 / N + 1 / inner + 1 / outer))

    attention = product(D, (H + 2 * G) * C) + product(H * C, D)
    feed = product(D, 2 * F) + product(F, D)
    scores = 2 * N * 2 * H * C * (T + 1) / 2 / (peak * 0.4 * T / (T + 16))
    moved = 2 * (4 + 2) * D + 2 * (2 * 4 + 2) * D + (H + G) * C * (2 * 2 + 3 * 4) + 5 * 2 * F
    weights = D * (H + 2 * G) * C + H * C * D + 3 * D * F
    rest = (3 * N * moved + 16 * weights + 30 * N * V + 16 * D * V) / (0.5 * bandwidth)
    assert part(step, "attention").seconds == pytest.approx(3 * attention)
    assert part(step, "feed forward").seconds == pytest.approx(3 * feed)
    assert part(step, "attention scores").seconds == pytest.approx(3.5 * scores)
    assert part(step, "passes over memory").seconds == pytest.approx(rest)
    assert part(step, "head").seconds == pytest.approx(3 * product(D, V))
    update = 44 * (weights + 2 * D * V) / (0.5 * bandwidth)
    assert part(step, "update").seconds == pytest.approx(update)
    assert step.seconds == pytest.approx(3 * (attention + feed + product(D, V)) + 3.5 * scores + rest + update)


def test_what_sharding_sends_by_hand() -> None:
    """Forward and backward a layer's weights in bf16 and its gradients in fp32; both ends in fp32, once."""
    job = job_of(grid=Grid(size=4, shard=4), microbatches=3)
    D, F, C, H, G = 32, 96, 8, 4, 2
    layer = D * (H + 2 * G) * C + H * C * D + 3 * D * F
    sent = 3 / 4 * (4 * layer * (2 * 2 + 4) + 2 * D * V * (4 + 4))
    links = Links(Link(1e9, 0.0), FREE, 4)
    plain = part(step_time(job, device_of(links)), "shard")
    assert plain.sent == pytest.approx(3 * sent) and plain.seconds == pytest.approx(3 * sent / 1e9)
    once = step_time(job, device_of(), replace(OURS, reshards=False))
    assert part(once, "shard").sent == pytest.approx(3 * (sent - 3 / 4 * 4 * layer * 2))


def test_gathering_hides_behind_as_much_as_there_is_to_compute() -> None:
    fast, slow = (Links(link, link, 4) for link in (Link(1e12, 0.0), Link(1e4, 0.0)))
    job = job_of(grid=Grid(size=4, shard=4))
    hidden = part(step_time(job, device_of(fast)), "shard")
    ends = 2 * 3 / 4 * 2 * 32 * V * (4 + 4) / 1e12
    assert hidden.exposed == pytest.approx(ends), "of both ends, in both micro-batches"
    shown = part(step_time(job, device_of(slow)), "shard")
    assert shown.hidden < 0.01 * shown.seconds
    beside = part(step_time(job, device_of(fast)), "slower beside what is sent")
    assert beside.seconds == pytest.approx(EVERYTHING.contention * hidden.hidden)


def test_tensor_ranks_send_tokens_four_times_a_layer_and_have_their_part_of_the_products() -> None:
    alone, cut = (step_time(job_of(grid=Grid(size=t, tensor=t)), device_of()) for t in (1, 2))
    sent = part(cut, "tensor")
    assert sent.sent == pytest.approx(2 * 4 * 4 * (128 * 32 * (4 + 2)) / 2)
    assert sent.hidden == 0
    shares = device_of(shares=replace(EVERYTHING, side=0.0))
    whole, half = (step_time(job_of(grid=Grid(size=t, tensor=t)), shares) for t in (1, 2))
    for name in ("attention", "feed forward", "attention scores", "head"):
        assert part(half, name).seconds == pytest.approx(part(whole, name).seconds / 2), name
    assert cut.tokens_of_rank == alone.tokens_of_rank / 2
    again = step_time(job_of(grid=Grid(size=2, tensor=2), repeats=REPEATS["ops"]), device_of())
    assert part(again, "tensor").sent == pytest.approx(1.5 * sent.sent), "run again, tokens are gathered again"


def test_tokens_travel_to_experts_and_home_both_ways() -> None:
    grid, links = Grid(size=8, expert=8), Links(Link(1e9, 0.0), Link(1e8, 0.0), 4)
    plain = job_of("experts", grid=grid, microbatches=1)
    sent = part(step_time(plain, device_of(links)), "expert")
    met = 8 * (1 - (7 / 8) * (6 / 7))
    row = 32 * 2 + 8 * 2
    assert sent.sent == pytest.approx(4 * 4 * 128 * row * met * 7 / 8)
    assert sent.seconds == pytest.approx(4 * 4 * 128 * row * met * 4 / 8 / 1e8), "half of the ranks are on another node"
    assert 0 < sent.hidden < sent.seconds / 2, "behind shared experts"
    full = step_time(replace(plain, repeats=REPEATS["full"]), device_of(links))
    assert part(full, "expert").sent == pytest.approx(5 / 4 * sent.sent), "there once more, not home"
    assert part(step_time(replace(plain, repeats=REPEATS["ops"]), device_of(links)), "expert").sent == sent.sent
    by_node = part(step_time(plain, device_of(links), replace(OURS, dispatch="node")), "expert")
    assert by_node.seconds < sent.seconds, "fewer copies cross"
    fewer = part(step_time(replace(plain, grid=Grid(size=8, expert=4)), device_of(links)), "expert")
    assert fewer.seconds < sent.seconds / 4, "inside a node"


def test_ranks_that_share_experts_have_as_much_to_multiply_at_even_load() -> None:
    shares = device_of(shares=replace(EVERYTHING, side=0.0))
    alone, shared = (step_time(job_of("experts", grid=Grid(size=e, expert=e)), shares) for e in (1, 8))
    assert part(shared, "experts").seconds == pytest.approx(part(alone, "experts").seconds)
    edges = device_of()
    alone, shared = (step_time(job_of("experts", grid=Grid(size=e, expert=e)), edges) for e in (1, 8))
    assert part(shared, "experts").seconds < part(alone, "experts").seconds, "fewer experts with more rows each"


def test_what_is_computed_again_and_what_is_counted_beforehand() -> None:
    plain, ops, full = (step_time(job_of(repeats=REPEATS[kind]), device_of()) for kind in ("none", "ops", "full"))
    forward = sum(part(plain, name).seconds for name in ("attention", "feed forward")) / 3
    scores = part(plain, "attention scores").seconds / 3.5
    again = part(ops, "recomputed").seconds
    assert part(plain, "recomputed").seconds == 0 and again > forward
    assert part(full, "recomputed").seconds == pytest.approx(again + scores)
    counted = step_time(job_of(counts_first=True, microbatches=4), device_of())
    whole = step_time(job_of(repeats=REPEATS["full"], microbatches=4), device_of())
    assert part(counted, "counted beforehand").seconds == pytest.approx(3 / 4 * part(whole, "recomputed").seconds)


def test_ranks_of_a_pipeline_wait_for_each_other() -> None:
    free = device_of(Links(FREE, FREE, 4))

    def step(stages: int, microbatches: int, **given: Any) -> StepTime:
        return step_time(job_of(grid=Grid(size=stages, pipeline=stages), microbatches=microbatches, **given), free)

    one, two = step(1, 8), step(2, 8)
    waiting = part(two, "waiting in the pipeline")
    worked = two.seconds - waiting.seconds - part(two, "update").seconds
    assert waiting.seconds == pytest.approx(worked / 8), "one micro-batch more than there are"
    assert one.seconds / 2 < two.seconds < one.seconds
    assert part(step(2, 8, schedule="interleaved", parts=2), "waiting in the pipeline").seconds < waiting.seconds
    assert part(step(2, 8, schedule="zero_bubble", parts=2), "waiting in the pipeline").seconds < waiting.seconds / 2
    assert part(step(2, 16), "waiting in the pipeline").seconds == pytest.approx(waiting.seconds)
    sent = part(step_time(job_of(grid=Grid(size=2, pipeline=2)), device_of()), "pipeline")
    assert sent.sent == 2 * 2 * 128 * 32 * 4, "there and back, in each of two micro-batches"


def test_replicas_add_up_gradients_once_a_step() -> None:
    weights = multiplied_weights(model_of("dense"), V) + 32 * V

    def replicas(grid: Grid, **given: Any) -> Part:
        return part(step_time(job_of(grid=grid, **given), device_of()), "replicate")

    own = replicas(Grid(size=4))
    assert own.sent == pytest.approx(2 * 3 / 4 * 4 * weights) and own.hidden == 0
    assert replicas(Grid(size=4), microbatches=8).sent == own.sent
    cut = replicas(Grid(size=8, shard=4))
    assert cut.sent == pytest.approx(2 * 1 / 2 * 4 * weights / 4) and cut.hidden > 0
    assert replicas(Grid(size=4, shard=4)).seconds == 0


def test_rows_on_several_ranks_hide_behind_their_scores() -> None:
    sent = Volume(1000, 3000)
    job = job_of(grid=Grid(size=2), context=2, volumes={"full": sent})
    found = part(step_time(job, device_of()), "context")
    assert found.sent == 2 * 4 * 4000 and 0 < found.hidden <= found.seconds


RANDOM_GRIDS = [
    Grid(size=tensor * pipeline * data, shard=shard, expert=expert, tensor=tensor, pipeline=pipeline)
    for tensor in (1, 2)
    for pipeline in (1, 2)
    for data in (4, 16)
    for shard in (1, 4)
    for expert in (1, 4)
]


@pytest.mark.parametrize("grid", RANDOM_GRIDS, ids=lambda grid: "x".join(map(str, vars(grid).values())))
def test_what_holds_of_any_step(grid: Grid) -> None:
    draws = random.Random(repr(grid))
    job = job_of(
        draws.choice(["dense", "experts", "experts after dense layers"]),
        grid=grid,
        microbatches=draws.randint(2, 8),
        repeats=draws.choice(list(REPEATS.values())),
    )
    device = published("h100")
    step = step_time(job, device)
    assert all(0 <= part.hidden <= part.seconds * (1 + 1e-9) for part in step.parts), step.parts
    assert 0 < step.utilization < 1 and step.seconds >= sum(p.exposed for p in step.parts) * (1 - 1e-9)
    inside, across = device.links.inside, device.links.across
    faster: list[Callable[[], StepTime]] = [
        lambda: step_time(job, with_links(device, replace(inside, bandwidth=2 * inside.bandwidth), across)),
        lambda: step_time(job, with_links(device, inside, replace(across, bandwidth=2 * across.bandwidth))),
        lambda: step_time(job, replace(device, memory_bandwidth=2 * device.memory_bandwidth)),
    ]
    for better in faster:
        assert better().seconds <= step.seconds * (1 + 1e-9)
    crowded = step_time(job, replace(device, links=replace(device.links, ranks_per_node=1)))
    assert crowded.seconds >= step.seconds * (1 - 1e-9), "links between nodes are slower"


def with_links(device: Device, inside: Link, across: Link) -> Device:
    return replace(device, links=replace(device.links, inside=inside, across=across))


def test_compiled_steps_move_less() -> None:
    for name in MODELS:
        for layer in range(4):
            plain, fused = (
                passes(model_of(name), layer, Cuts(), Bytes(is_fused=is_fused)) for is_fused in (False, True)
            )
            assert plain.keys() == fused.keys() and sum(fused.values()) < sum(plain.values())


def test_small_products_are_slower_than_large_ones() -> None:
    timer = Timer(job_of(), published("h100"), OURS)
    rates = [p.flops / timer.product(p) / 989e12 for p in (Product("x", n, n, n) for n in (64, 512, 4096, 65536))]
    assert rates == sorted(rates) and rates[0] < 0.15 and 0.65 < rates[-1] < 0.68
    assert alike(0.4).side == 0
