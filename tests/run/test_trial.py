"""The largest batch first: what is tried, that nothing is left of it, and what is said where memory runs out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from data.batches import Batches
from model.initialize import initialize
from model.kept import Numbers
from model.transformer import Transformer, build_model
from optim.groups import Optimizer, build_optimizer
from parallel.apply import parallelize
from parallel.world import World
from run import trial
from run.config import RunConfig, load_config
from run.needs import gigabytes, needs_of
from run.start import Run
from run.trial import forward_and_backward, largest_steps, try_batches
from settings import Refusal
from tests.test_train import numbers, scores

TINY = Path(__file__).parents[1] / "tiny.toml"
CPU = torch.device("cpu")
Ready = tuple[Transformer, Optimizer, Batches, Run]
pytestmark = pytest.mark.usefixtures("here")


def ready(*overrides: str) -> Ready:
    config = load_config(TINY, list(overrides))
    run = Run(config, Path("runs/none"), CPU, torch.float32, World())
    batches = Batches(config.data, seed=config.seed)
    model = build_model(config.model, batches.tokenizer.vocab_size)
    run.layouts = parallelize(model, run.mesh, config, CPU)
    initialize(model, 0, CPU)
    model.use_rotary(config.stages[0].rotary)
    return model, build_optimizer(model, config.optimizer), batches, run


def run_of(config: RunConfig, size: int = 1) -> Run:
    return Run(config, Path("runs/none"), CPU, torch.float32, World(0, size))


def tried(size: int, *overrides: str, tokens: int = 0) -> list[tuple[int, int, int]]:
    """(stage, length, ranks of a row) of what would be tried on so many ranks."""
    config = load_config(TINY, list(overrides))
    steps = largest_steps(run_of(config, size), tokens)
    return [(step.stage.index, step.sequence_length, config.row_ranks(step.stage)) for step in steps]


THIRD = "{until_tokens = 8192, sequence_length = %d, rotary = {kind = 'default', base = 1e4}%s}"


def three_stages(length: int, extra: str = "") -> tuple[str, ...]:
    stages = [
        THIRD.replace("8192", str(until)) % (size, more)
        for until, size, more in ((4096, 64, ""), (6144, 128, ""), (8192, length, extra))
    ]
    return (f"context.stages=[{', '.join(stages)}]", "total_tokens=8192")


def test_every_shape_to_come_is_tried_once_and_the_largest_first() -> None:
    assert tried(1) == [(1, 128, 1), (0, 64, 1)]
    assert tried(1, tokens=4096) == [(1, 128, 1)] and tried(1, tokens=4095) == [(1, 128, 1), (0, 64, 1)]
    assert tried(1, tokens=6144) == []
    assert tried(1, *three_stages(64)) == [(1, 128, 1), (0, 64, 1)], "the third is like the first"
    assert tried(1, *three_stages(64), tokens=4096) == [(1, 128, 1), (2, 64, 1)]


def test_under_a_growing_window_the_widest_is_tried() -> None:
    growth = "context.stages.1.growth={kind = 'window', start = 16, rate = 8.0}"
    assert load_config(TINY, [growth]).stages[1].longest_step().window == 16 + 8 * 3


def test_a_share_of_a_row_counts_as_so_much_less() -> None:
    more = ", tokens_per_step = 1024"
    together = ("tokens_per_microbatch=256", *three_stages(256, f"{more}, context = 2"))
    assert tried(2, *together) == [(1, 128, 1), (0, 64, 1), (2, 256, 2)]
    assert tried(2, *together, "tokens_per_microbatch=128", "context.stages.2.sequence_length=128") == [
        (1, 128, 1),
        (0, 64, 1),
        (2, 128, 2),
    ]
    config = load_config(TINY, list(together))
    assert len(largest_steps(run_of(config, 2), 0)) == 3


@pytest.mark.parametrize("settings", [(), ("recompute=true", "tokens_per_microbatch=512"), ("precision=bf16",)])
def test_a_run_is_the_same_with_and_without_a_trial(here: Path, settings: tuple[str, ...]) -> None:
    train.main(load_config(TINY, ["name=with", *settings]))
    train.main(load_config(TINY, ["name=without", "trial=false", *settings]))
    assert numbers("with") == numbers("without") and scores("with") == scores("without")
    ours, theirs = (
        (here / "runs" / name / "checkpoints/step_00000012/model.safetensors").read_bytes()
        for name in ("with", "without")
    )
    assert ours == theirs
    ours, theirs = (
        (here / "runs" / name / "checkpoints/step_00000012/optimizer.safetensors").read_bytes()
        for name in ("with", "without")
    )
    assert ours == theirs


def test_a_resumed_run_tries_what_is_left_and_may_change_its_mind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train.main(load_config(TINY, ["name=whole", "trial=false"]))
    seen: list[int] = []
    whole = trial.forward_and_backward

    def watched(model: Transformer, batches: Batches, run: Run, step: Any) -> None:
        seen.append(step.sequence_length)
        whole(model, batches, run, step)

    def fall(*arguments: Any) -> None:
        raise KeyboardInterrupt("the power failed")

    monkeypatch.setattr(trial, "forward_and_backward", watched)
    steps, calls = train.train_step, iter(range(100))
    with monkeypatch.context() as broken:
        broken.setattr(train, "train_step", lambda *args: fall() if next(calls) == 10 else steps(*args))
        with pytest.raises(KeyboardInterrupt):
            train.main(load_config(TINY, ["name=broken"]))
    assert seen == [128, 64]
    train.main(load_config(TINY, ["name=broken"]))
    assert seen == [128, 64, 128] and numbers("broken") == numbers("whole")
    train.main(load_config(TINY, ["name=broken"]))
    assert seen == [128, 64, 128], "a finished run tries nothing"


def everything(model: Transformer, optimizer: Optimizer) -> list[torch.Tensor]:
    state = [value for inner in optimizer.optimizers for state in inner.state.values() for value in state.values()]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *state)]


@pytest.mark.parametrize("has_moments", [False, True])
def test_nothing_is_left_of_it(has_moments: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer, batches, run = ready()
    if has_moments:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    rotary, group, random = model.rotary, run.row_group, torch.get_rng_state()
    before = everything(model, optimizer)
    try_batches(model, optimizer, batches, run, 0)
    assert all(map(torch.equal, everything(model, optimizer), before))
    assert len(before) == len(everything(model, optimizer)), "and no moments that were not there"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.rotary is rotary and run.row_group is group and not model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert capsys.readouterr().out.startswith("trial: a micro-batch of 2 x 128 tokens fits; ")


def test_it_is_a_step_of_training_but_for_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of the first micro-batch, with the rotation of its stage, beside those of earlier ones."""
    model, optimizer, batches, run = ready("tokens_per_microbatch=256")
    seen: list[tuple[str, bool, dict[str, torch.Tensor], list[bool]]] = []

    def watched(model: Transformer, batches: Batches, run: Run, step: Any) -> None:
        had = [parameter.grad is not None for parameter in model.parameters()]
        forward_and_backward(model, batches, run, step)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert model.rotary is not None
        seen.append((model.rotary.spec.kind, model.training, gradients, had))

    monkeypatch.setattr(trial, "forward_and_backward", watched)
    try_batches(model, optimizer, batches, run, 0)
    assert [(kind, training) for kind, training, _, _ in seen] == [("yarn", True), ("default", True)]
    assert all(all(had) for _, _, _, had in seen)
    step = run.config.stages.step(0)
    (batch, _) = train.take_step(batches, step, run)
    model.use_rotary(step.stage.rotary)
    hidden_BTD, _ = train.forward(model, batch, run)
    losses = torch.nn.functional.cross_entropy(
        (hidden_BTD @ model.head_weight.T).flatten(0, 1), batch.labels_BT.flatten(), reduction="none"
    )
    (losses * batch.weights_BT.flatten()).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(seen[1][2][name], parameter.grad, rtol=1e-4, atol=1e-5)
    model, optimizer, batches, run = ready("tokens_per_microbatch=512")
    try_batches(model, optimizer, batches, run, 0)
    assert not any(any(had) for _, _, _, had in seen[2:]) and len(seen) == 4, "a single micro-batch has none before it"


def fail_at(length: int, error: Exception) -> Callable[..., None]:
    def failing(model: Transformer, batches: Batches, run: Run, step: Any) -> None:
        if step.sequence_length == length:
            raise error

    return failing


CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 15.00 MiB is"
    " free. Including non-PyTorch memory, this process has 79.09 GiB memory in use."
)
SYSTEM = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    " 8589934592 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize("error", [CUDA, SYSTEM, MemoryError("Unable to allocate 8 GiB")])
def test_a_lack_of_memory_is_a_refusal_that_says_the_ways_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "forward_and_backward", fail_at(128, error))
    model, optimizer, batches, run = ready("tokens_per_microbatch=256")
    with pytest.raises(Refusal) as refused:
        try_batches(model, optimizer, batches, run, 0)
    said = str(refused.value)
    assert said.startswith("context.stages.1: a micro-batch of 2 x 128 tokens, for which by arithmetic")
    assert "are needed, does not fit into the memory of cpu; try " in said
    needed = needs_of(run.config, model.vocab_size, run.config.stages[1].longest_step(), 1, Numbers(4, "cpu"))
    assert f"{gigabytes(needed.total)} are needed" in said
    ways = "recompute=ops or recompute=full or tokens_per_microbatch=128 or context.stages.1.context=2 on 2 ranks"
    assert f"try {ways} or more (" in said and "llocate" in said and "non-PyTorch" not in said
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_what_would_help_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(length: int, *overrides: str) -> str:
        monkeypatch.setattr(trial, "forward_and_backward", fail_at(length, SYSTEM))
        with pytest.raises(Refusal) as refused:
            try_batches(*ready(*overrides), 0)
        return str(refused.value).partition("try ")[2].partition(" (")[0]

    kinds, more = "recompute=ops or recompute=full", "context.stages.1.context=2 on 2 ranks or more"
    assert said(128, "tokens_per_microbatch=128") == f"{kinds} or {more}"
    assert said(128, "tokens_per_microbatch=128", "recompute=ops") == f"recompute=full or {more}"
    assert said(64, "recompute=full", "tokens_per_microbatch=512").startswith("tokens_per_microbatch=256 or context")
    assert said(64, "recompute=full", "tokens_per_microbatch=128").startswith("context.stages.0.context=2")
    needed = trial.needs_of

    def never(config: RunConfig, *rest: Any) -> Any:
        return replace(needed(config, *rest), weights=0 if config.tokens_per_microbatch == 128 else 10**15)

    monkeypatch.setattr(trial, "needs_of", never)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10**12))
    model, _, _, run = ready("recompute=full", "tokens_per_microbatch=512")
    run.device = torch.device("cuda")
    ways = trial._ways_out(model, run, run.config.stages[0].longest_step())
    assert ways[0] == "tokens_per_microbatch=128", "what cannot fit by arithmetic is no way out"


def test_it_can_be_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(trial, "forward_and_backward", fail_at(128, SYSTEM))
    try_batches(*ready("trial=false"), 0)
    assert not capsys.readouterr().out


def test_another_error_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "forward_and_backward", fail_at(128, RuntimeError("shapes do not match")))
    model, optimizer, batches, run = ready()
    with pytest.raises(RuntimeError, match="shapes do not match") as raised:
        try_batches(model, optimizer, batches, run, 0)
    assert not isinstance(raised.value, Refusal)


def test_a_refused_run_starts_with_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder has nothing to lose yet."""
    with monkeypatch.context() as small:
        small.setattr(trial, "forward_and_backward", fail_at(128, SYSTEM))
        with pytest.raises(Refusal, match="recompute=full"):
            train.main(load_config(TINY, []))
    train.main(load_config(TINY, ["recompute=true"]))
    assert len(numbers("tiny")) == 12


def test_moments_that_will_be_there_take_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    empty = torch.empty

    def watched(*size: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.uint8:
            taken.append(size[0])
        return empty(*size, **options)

    monkeypatch.setattr(trial, "forward_and_backward", lambda *arguments: None)
    monkeypatch.setattr(torch, "empty", watched)
    model, optimizer, batches, run = ready()
    try_batches(model, optimizer, batches, run, 0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    try_batches(model, optimizer, batches, run, 4096)
    tensors = list(model.parameters())
    assert taken == [2 * sum(p.nbytes for p in tensors) + 4 * len(tensors)] * 2 + [0]


def test_sizes_are_told_in_three_digits() -> None:
    assert gigabytes(-2048) == "-2 KiB"
    assert [gigabytes(size) for size in (0, 999, 2048, 5 * 2**20, 81.25 * 2**30)] == [
        *("0 B", "999 B", "2 KiB", "5 MiB", "81.2 GiB"),
    ]


def test_what_evaluations_will_need_is_tried_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole copy of a cut model that does not fit would show at the first evaluation, hours later."""
    model, optimizer, batches, run = ready()

    def full(*_: object) -> None:
        raise MemoryError("Unable to allocate 8 GiB")

    monkeypatch.setattr(trial, "whole_model", full)
    try_batches(model, optimizer, batches, run, 0)  # it is whole already
    monkeypatch.setattr(trial, "is_in_parts", lambda _: True)
    with pytest.raises(
        Refusal, match=r"the whole model, .* which evaluations ask on each rank, does not fit .*evals\.tasks=\[\]"
    ):
        try_batches(model, optimizer, batches, run, 0)
    assert all(parameter.grad is None for parameter in model.parameters())
    model, optimizer, batches, run = ready("evals.tasks=[]")
    try_batches(model, optimizer, batches, run, 0)
