"""What was trained, where the length of the rows changes inside a stage."""

from types import SimpleNamespace

import pytest

from context.growth import Growth, LinearGrowth, PowerOfTwoGrowth
from context.rotary import DefaultRotary
from context.stages import Stages, StageSettings
from evals.lengths import trained_length
from evals.scoring import Cell
from run.record import Progress, Recorder


def stages(growth: Growth) -> Stages:
    rotary = DefaultRotary(base=1e4)
    plain = StageSettings(until_tokens=1024, sequence_length=64, rotary=rotary)
    return Stages(
        [plain, StageSettings(until_tokens=9216, sequence_length=128, rotary=rotary, growth=growth)],
        tokens_per_step=256,
    )


@pytest.mark.parametrize(
    ("growth", "lengths"),
    [
        (LinearGrowth(start=32), {1280: 32, 5120: 64, 9216: 128}),
        (LinearGrowth(start=256), {1280: 256, 9216: 256}),
        (PowerOfTwoGrowth(shortest=32, cycles=2), {1280: 128, 1536: 128, 9216: 128}),
    ],
    ids=["grows", "shrinks", "in cycles"],
)
def test_what_a_stage_leads_to_is_not_trained_yet(growth: Growth, lengths: dict[int, int]) -> None:
    """At its start nothing of it is: the stage before says what was."""
    placed = stages(growth)
    expected = {0: 64, 256: 64, 1024: 64, **lengths}
    assert {tokens: trained_length(placed, tokens) for tokens in expected} == expected


def test_a_run_writes_down_what_was_trained_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    placed, logged, drawn = stages(LinearGrowth(start=32)), [], []
    recorder = object.__new__(Recorder)
    recorder.metrics = SimpleNamespace(log_evals=lambda step, tokens, rows: logged.extend(rows))
    recorder.line = SimpleNamespace()
    config = SimpleNamespace(stages=placed, log=SimpleNamespace(tensorboard=False))
    recorder.run = SimpleNamespace(config=config, world=SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(recorder, "_show_needles", lambda cells, when, trained: drawn.append(trained))
    cells = [Cell("needle", 64, 0.5, 1.0, 2)]
    recorder.record_evals(Progress(4, 1024), placed[1], cells, before=placed[0])
    for tokens in (5120, 9216):
        recorder.record_evals(Progress(8, tokens), placed[1], cells)
    assert [row["trained_length"] for row in logged] == [64, 64, 128] and drawn == [64, 128]
