"""Steps that go wrong: nothing changes by them, all ranks do alike, and a run that is broken off goes on the same."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import train
from checkpoint.checkpoints import Checkpoints, read_checkpoint
from moe.balance import BiasBalanceSettings, update_biases
from moe.router import Router
from optim.groups import AdamWSettings, Optimizer, build_optimizer
from parallel.world import World
from run import guard as guard_module
from run.guard import Guard, GuardSettings, all_finite, undone_where
from run.spikes import SpikeSettings
from settings import Refusal
from tests.run.poison import LARGE, NAN, die_at, poison, tiny, watch_changes

QUIET = ("evals.every_tokens=6144", "trial=false")
SPIKES = "guard.spike={window = 4, deviations = 1e3, action = '%s', of = ['gradient_norm']}"


@pytest.fixture(params=["host", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who decides: the host, or the device as on a GPU, which the host asks later."""
    monkeypatch.setattr(guard_module, "can_skip_on_device", lambda *_: request.param == "device")
    return str(request.param)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path("runs") / name / "metrics.jsonl").read_text().splitlines()]


def numbers(name: str) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "gradient_norm", "max_violation", "skipped_steps", "skip_reason")
    return [tuple(row.get(key) for key in keys) for row in rows(name)]


def saved(name: str) -> dict[str, Any]:
    """By step, the guard's part of each checkpoint's state."""
    paths = sorted(Path("runs", name, "checkpoints").glob("step_*/state.json"))
    return {path.parent.name: json.loads(path.read_text())["guard"] for path in paths}


def weights(name: str) -> dict[str, Tensor]:
    return read_checkpoint(f"runs/{name}")[2]


def assert_same_weights(ours: str, theirs: str) -> None:
    one, other = weights(ours), weights(theirs)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Numbers that are none.


def test_a_skipped_step_changes_no_bit(here: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    changes = watch_changes(monkeypatch)
    poison(monkeypatch, {5: NAN, 6: NAN, 10: NAN})
    train.main(tiny(*QUIET))
    assert [step for step, has_changed in changes.items() if not has_changed] == [5, 6, 10]
    told = {row["step"]: row["skip_reason"] for row in rows("tiny") if row["skipped_steps"]}
    assert told == dict.fromkeys((5, 6, 10), "the gradient norm is not finite")
    assert [row["tokens"] for row in rows("tiny")] == list(range(512, 6145, 512)), "the data of the step is passed over"
    assert saved("tiny")["step_00000012"]["passed_over"] == [[5, 6, told[5]], [10, 10, told[10]]]


def test_rows_count_what_was_skipped_since_the_row_before(
    here: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    poison(monkeypatch, {2: NAN, 5: NAN, 6: NAN, 7: NAN})
    train.main(tiny(*QUIET, "log.every_steps=4", "checkpoint.every_steps=100"))
    assert [row["skipped_steps"] for row in rows("tiny")] == [1, 3, 0]


def test_a_run_that_was_killed_skips_and_counts_as_it_would_have(
    here: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    poison(monkeypatch, {4: NAN, 5: NAN, 8: NAN})
    rare = ("log.every_steps=5", *QUIET)
    train.main(tiny("name=whole", *rare))
    for step in (6, 9):
        with monkeypatch.context() as broken:
            die_at(broken, step)
            with pytest.raises(KeyboardInterrupt):
                train.main(tiny("name=killed", *rare))
    train.main(tiny("name=killed", *rare))
    assert numbers("killed") == numbers("whole")
    assert saved("killed") == saved("whole") and saved("whole")["step_00000012"]["skipped"] == 3
    assert_same_weights("killed", "whole")


def test_after_too_many_in_a_row_the_run_stops_and_names_the_last_good_checkpoint(
    here: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    poison(monkeypatch, dict.fromkeys((2, 4, 5, 6, 7, 10), NAN))
    config = tiny(*QUIET, "guard.most_skipped=2", "log.every_steps=1", "total_tokens=6144")
    with pytest.raises(Refusal, match=r"step 6: the gradient norm is not finite.*the checkpoint of step 3 is intact"):
        train.main(config)
    assert list(saved("tiny")) == ["step_00000003"]
    with pytest.raises(Refusal, match=r"guard.most_skipped=2"):
        train.main(config)
    train.main(tiny(*QUIET, "guard.most_skipped=4"))  # may be changed: it is no other run
    assert rows("tiny")[-1]["step"] == 12


def test_on_the_device_too_many_are_found_out_without_a_row(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "can_skip_on_device", lambda *_: True)
    poison(monkeypatch, dict.fromkeys((2, 3, 4, 6), NAN))
    rare = ("log.every_steps=100", "checkpoint.every_steps=100", "guard.most_skipped=2", *QUIET)
    with pytest.raises(Refusal, match=r"after 2 skipped steps in a row"):
        train.main(tiny(*rare))


def test_a_checkpoint_waits_for_a_step_that_is_taken(here: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    poison(monkeypatch, {3: NAN, 6: NAN, 7: NAN, 8: NAN})
    with pytest.raises(Refusal, match=r"step 8: .* as the last of 3 skipped steps before the stage's end; the checkpo"):
        train.main(tiny(*QUIET))
    assert list(saved("tiny")) == ["step_00000004"]


def test_the_end_of_a_stage_is_saved_though_its_last_step_was_skipped(
    here: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    poison(monkeypatch, {8: NAN, 12: NAN})
    train.main(tiny(*QUIET))
    assert {"step_00000008", "step_00000012"} <= set(saved("tiny"))


def test_weights_that_are_no_numbers_are_never_saved(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's own loss and gradient were measured before they came to be."""
    whole = Optimizer.step

    def step(self: Optimizer) -> None:
        whole(self)
        if int(self.optimizers[0].state_dict()["state"][0]["step"]) == 6:
            with torch.no_grad():
                self.parameters[3].view(-1)[0] = torch.inf

    monkeypatch.setattr(Optimizer, "step", step)
    with pytest.raises(Refusal, match=r"step 6: weights or moments are not finite.*the checkpoint of step 3 is intact"):
        train.main(tiny(*QUIET))
    assert list(saved("tiny")) == ["step_00000003"]


def test_what_is_finite() -> None:
    fine = [torch.tensor([3e38]), torch.zeros(0), torch.tensor([2**40]), torch.tensor(1.0, dtype=torch.bfloat16)]
    assert all_finite(fine) and all_finite([])
    for wrong in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite([*fine, torch.tensor([[0.0, wrong]])])


def test_muon_and_a_rule_for_spikes_need_the_host() -> None:
    model, cuda = nn.Linear(2, 2), torch.device("cuda")
    adamw, plain = build_optimizer(model, AdamWSettings(learning_rate=1.0)), GuardSettings()
    muon = Optimizer([torch.optim.Muon([model.weight])], 1.0, 1.0)
    assert guard_module.can_skip_on_device(plain, adamw, cuda)
    assert not guard_module.can_skip_on_device(plain, muon, cuda)
    assert not guard_module.can_skip_on_device(plain, adamw, torch.device("cpu"))
    assert not guard_module.can_skip_on_device(GuardSettings(spike=SpikeSettings()), adamw, cuda)


def test_muon_skips_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = watch_changes(monkeypatch)
    poison(monkeypatch, {5: NAN})
    train.main(tiny(*QUIET, "optimizer.kind=muon"))
    assert [step for step, has_changed in changes.items() if not has_changed] == [5]


def test_the_way_that_scalers_take_is_left_as_it_was() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, AdamWSettings(learning_rate=1.0))
    with pytest.raises(KeyError), undone_where(torch.tensor(True), optimizer, []):
        raise KeyError
    assert not hasattr(optimizer.optimizers[0], "found_inf")


# Spikes.


def test_a_spike_is_skipped_and_not_remembered(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = watch_changes(monkeypatch)
    poison(monkeypatch, {5: LARGE, 6: LARGE, 11: LARGE})
    train.main(tiny(*QUIET, SPIKES % "skip"))
    assert [step for step, has_changed in changes.items() if not has_changed] == [5, 6, 11]
    assert "the gradient norm is" in rows("tiny")[4]["skip_reason"]
    assert len(saved("tiny")["step_00000012"]["history"]["gradient_norm"]) == 0, "a stage begins with none"
    assert len(saved("tiny")["step_00000009"]["history"]["gradient_norm"]) == 1


def test_a_killed_run_judges_by_the_same_window(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spike comes right after the resume, with a window that only the checkpoint knows."""
    poison(monkeypatch, {7: LARGE})
    train.main(tiny("name=whole", *QUIET, SPIKES % "skip"))
    with monkeypatch.context() as broken:
        die_at(broken, 7)
        with pytest.raises(KeyboardInterrupt):
            train.main(tiny("name=killed", *QUIET, SPIKES % "skip"))
    train.main(tiny("name=killed", *QUIET, SPIKES % "skip"))
    assert numbers("killed") == numbers("whole") and numbers("whole")[6][4] == 1
    assert_same_weights("killed", "whole")


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_after_a_roll_back_it_is_as_if_all_steps_since_the_checkpoint_had_been_skipped(
    here: Path, monkeypatch: pytest.MonkeyPatch, moments: str
) -> None:
    """In the second stage too, whose first step has thrown the moments away that the checkpoint brings back."""
    settings = (*QUIET, f"context.stages.1.moments={moments}", "checkpoint.every_steps=100")
    with monkeypatch.context() as inner:
        poison(inner, dict.fromkeys((9, 10, 11), NAN))
        train.main(tiny("name=skipped", *settings))
    with monkeypatch.context() as inner:
        poison(inner, {11: LARGE})
        train.main(tiny("name=back", *settings, SPIKES % "roll_back"))
    assert rows("back")[-1]["loss"] == rows("skipped")[-1]["loss"]
    assert_same_weights("back", "skipped")
    ours, theirs = (
        Path("runs", name, "checkpoints/step_00000012/optimizer.safetensors") for name in ("back", "skipped")
    )
    assert ours.read_bytes() == theirs.read_bytes()
    state = saved("back")
    assert list(state) == ["step_00000008", "step_00000011", "step_00000012"], "what was decided is saved at once"
    assert state["step_00000012"]["roll_backs"] == 1 and state["step_00000012"]["passed_over"][0][:2] == [9, 11]
    assert "rolled back to step 8" in rows("back")[10]["skip_reason"]
    assert state["step_00000011"]["history"] == state["step_00000008"]["history"], "the window went back too"


def test_a_run_killed_in_the_middle_of_a_roll_back_ends_in_the_same_numbers(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {5: LARGE, 7: LARGE})
    train.main(tiny("name=whole", *QUIET, SPIKES % "roll_back"))
    whole_save = Checkpoints.save
    for step in (5, 7):
        with monkeypatch.context() as broken:

            def save(self: Checkpoints, number: int, *rest: Any, dies_at: int = step, **named: Any) -> Path:
                if number == dies_at:
                    raise KeyboardInterrupt("the power failed")
                return whole_save(self, number, *rest, **named)

            broken.setattr(Checkpoints, "save", save)
            with pytest.raises(KeyboardInterrupt):
                train.main(tiny("name=killed", *QUIET, SPIKES % "roll_back"))
    train.main(tiny("name=killed", *QUIET, SPIKES % "roll_back"))
    assert numbers("killed") == numbers("whole") and saved("killed") == saved("whole")
    assert saved("whole")["step_00000012"]["roll_backs"] == 2
    assert_same_weights("killed", "whole")


def test_after_so_many_roll_backs_the_run_stops(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, dict.fromkeys((4, 7), LARGE))
    rule = SPIKES.replace("}", ", most_roll_backs = 1}") % "roll_back"
    with pytest.raises(Refusal, match=r"step 7: .*after 1 roll backs.*the checkpoint of step 6 is intact"):
        train.main(tiny(*QUIET, rule))


def test_without_a_checkpoint_to_go_back_to_a_spike_is_skipped(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = watch_changes(monkeypatch)
    poison(monkeypatch, {4: LARGE})
    train.main(tiny(*QUIET, SPIKES % "roll_back", "checkpoint.every_steps=100"))
    assert [step for step, has_changed in changes.items() if not has_changed] == [4]
    assert saved("tiny")["step_00000012"]["roll_backs"] == 0


# Over ranks.


def a_router() -> Router:
    config = tiny()
    assert config.model.moe is not None
    from model.transformer import build_model

    model = build_model(config.model, 300)
    return next(module.to_empty(device="cpu") for module in model.modules() if isinstance(module, Router))


def take_steps(
    world: World, seen: list[tuple[float, float]], spike: SpikeSettings | None, is_deferred: bool
) -> list[bool]:
    """Which of some steps changed this rank's weights or biases, by what it saw of their loss and gradient norm."""
    guard_module.can_skip_on_device = lambda *_: is_deferred
    router, model = a_router(), nn.Linear(3, 3)
    bias_E = router.bias_E
    assert bias_E is not None
    bias_E.zero_()
    optimizer = build_optimizer(model, AdamWSettings(learning_rate=0.1))
    guard, changed = Guard(GuardSettings(spike=spike), world), []
    for loss, norm in seen:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = [model.weight.detach().clone(), bias_E.clone()]
        counts_LE = torch.arange(len(bias_E))[None]
        move = partial(update_biases, [router], counts_LE, [BiasBalanceSettings()])
        guard.update(optimizer, torch.tensor(loss), torch.tensor(norm), [router], move)
        after = [model.weight, bias_E]
        same = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
        assert len(set(same)) == 1, "the bias is moved with the weights, or not at all"
        changed.append(not same[0])
    return changed


def case_what_one_rank_saw_all_ranks_skip() -> None:
    world = World(dist.get_rank(), dist.get_world_size())
    nan_here = float("nan") if world.rank == 1 else 1.0
    for is_deferred in (False, True):
        changed = take_steps(world, [(1.0, 1.0), (1.0, nan_here), (nan_here, 1.0), (2.0, 2.0)], None, is_deferred)
        dist.barrier()
        assert changed == [True, False, False, True], (world.rank, is_deferred, changed)


def case_ranks_that_differ_by_rounding_judge_alike() -> None:
    world = World(dist.get_rank(), dist.get_world_size())
    spike = SpikeSettings(window=2, deviations=1.0)
    mean, deviation = 2.0, 2.0**0.5
    edge = torch.tensor(mean + deviation, dtype=torch.float64).float()
    here = float(torch.nextafter(edge, torch.tensor(9.0))) if world.rank == 1 else float(edge) - 1e-3
    changed = take_steps(world, [(1.0, 1.0), (3.0, 1.0), (here, 1.0)], spike, False)
    all_changed: list[Any] = [None] * world.size
    dist.all_gather_object(all_changed, changed)
    assert all(each == changed for each in all_changed), all_changed
    assert changed == [True, True, False], changed


CASES = [name for name in globals() if name.startswith("case_")]


@pytest.fixture(scope="module")
def outcomes(run_on_ranks: Callable[..., dict[int, dict[str, str]]]) -> dict[int, dict[str, str]]:
    return run_on_ranks(__file__, 2)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(outcomes: dict[int, dict[str, str]], case: str) -> None:
    assert outcomes[2].get(case, "it never ran") == ""
