"""Schedules against transformers where the shapes agree, and their properties where they do not."""

import pytest
import torch

from optim.schedule import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    WSDSchedule,
    check_schedule,
    decay_length,
    learning_rate,
)

TOTAL = 1000
ALL = [
    ConstantSchedule(warmup_tokens=100),
    CosineSchedule(warmup_tokens=100),
    LinearSchedule(warmup_tokens=100),
    WSDSchedule(warmup_tokens=100, decay_share=0.3, final=0.1),
    WSDSchedule(warmup_tokens=100, decay_tokens=250, shape="sqrt"),
    WSDSchedule(warmup_tokens=0, decay_share=1.0),
]


def theirs(build, **arguments):
    """The multiplier that a transformers schedule gives before each of TOTAL steps, and at the end."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build(optimizer, **arguments)
    rates = []
    for _ in range(TOTAL + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def ours(settings):
    return [learning_rate(settings, tokens, TOTAL) for tokens in range(TOTAL + 1)]


def test_cosine_and_linear_equal_transformers():
    optimization = pytest.importorskip("transformers.optimization")
    steps = {"num_warmup_steps": 100, "num_training_steps": TOTAL}
    cosine = theirs(optimization.get_cosine_schedule_with_warmup, **steps)
    assert ours(CosineSchedule(warmup_tokens=100, final=0.0)) == pytest.approx(cosine)
    cosine = theirs(optimization.get_cosine_with_min_lr_schedule_with_warmup, **steps, min_lr_rate=0.1)
    assert ours(CosineSchedule(warmup_tokens=100, final=0.1)) == pytest.approx(cosine)
    linear = theirs(optimization.get_linear_schedule_with_warmup, **steps)
    assert ours(LinearSchedule(warmup_tokens=100)) == pytest.approx(linear)


@pytest.mark.parametrize(("shape", "name"), [("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt")])
def test_wsd_equals_transformers(shape, name):
    optimization = pytest.importorskip("transformers.optimization")
    arguments = {"num_warmup_steps": 100, "num_decay_steps": 250, "num_training_steps": TOTAL, "decay_type": name}
    for final in (0.0, 0.2):
        rates = theirs(optimization.get_wsd_schedule, **arguments, min_lr_ratio=final)
        mine = ours(WSDSchedule(warmup_tokens=100, decay_tokens=250, final=final, shape=shape))
        # Their warm-up starts at the final rate, ours always at 0.
        start = 0 if final == 0 else 100
        assert mine[start:] == pytest.approx(rates[start:])


@pytest.mark.parametrize("settings", ALL, ids=lambda s: f"{s.kind}-{s.warmup_tokens}")
def test_every_schedule_rises_once_falls_once_and_stays_in_range(settings):
    rates = ours(settings)
    peak = rates.index(max(rates))
    assert max(rates) == 1.0 and min(rates) >= 0.0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(getattr(settings, "final", 1.0))
    assert learning_rate(settings, 10 * TOTAL, TOTAL) == pytest.approx(rates[-1])


def test_scale_of_tokens_does_not_matter():
    small = WSDSchedule(warmup_tokens=10, decay_share=0.25)
    large = WSDSchedule(warmup_tokens=10_000_000, decay_share=0.25)
    for tokens in range(0, 101, 7):
        assert learning_rate(small, tokens, 100) == pytest.approx(learning_rate(large, tokens * 10**6, 100 * 10**6))


def test_decay_length():
    assert decay_length(WSDSchedule(decay_tokens=7), TOTAL) == 7
    assert decay_length(WSDSchedule(decay_share=0.5), TOTAL) == 500
    assert decay_length(WSDSchedule(), TOTAL) == 200
    with pytest.raises(ValueError, match=r"decay_tokens=7 and decay_share=0\.5"):
        WSDSchedule(decay_tokens=7, decay_share=0.5)


def test_too_short_a_run_is_refused():
    check_schedule(WSDSchedule(warmup_tokens=800), TOTAL)
    with pytest.raises(ValueError, match=r"warmup_tokens=801 and a decay of 200 tokens .* total_tokens=1000"):
        check_schedule(WSDSchedule(warmup_tokens=801), TOTAL)
    with pytest.raises(ValueError, match="warmup_tokens=1001"):
        check_schedule(CosineSchedule(warmup_tokens=1001), TOTAL)
